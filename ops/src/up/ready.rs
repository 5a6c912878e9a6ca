//! From running processes to a cluster that answers: tenant, keys and models, then waiting until the gateway is ready.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use coordinator::clock::{self, now_ms};
use coordinator::control::{
    Command, ControlHandle, ControlState, Deployment, Error, Group, GroupState, ModelKind,
    Rejection, api_key_from,
};
use coordinator::ids::{Epoch, TenantId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::layout::{self, DEMO_TENANT, Former, Keys};
use super::{Served, examples, say};
use crate::{models, operator};

const TENANT_NAME: &str = "Musterstadt";
/// An election takes about a second; on a loaded machine the processes need some to start.
const LEADER_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks at the gateway.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A model that failed in so many formings fails for good.
const HOPELESS_FORMINGS: usize = 2;
/// How often waiting is explained.
const EXPLAIN_EVERY: Duration = Duration::from_secs(5);

/// Everything that bringing a cluster up needs.
pub struct BringUp {
    pub data: PathBuf,
    pub keys: Keys,
    pub former: Vec<Former>,
    pub gateway: SocketAddr,
    pub served: Served,
    pub examples: Option<PathBuf>,
}

impl BringUp {
    /// Returns when the cluster is ready and its address is printed, with the examples uploaded if there are any.
    pub async fn run(self) -> Result<()> {
        let started = clock::monotonic();
        let operator = operator::connect(&self.data)?;
        let control = &operator.control;
        let state = control
            .wait_for(LEADER_WITHIN, |s| !s.cluster.id.is_empty())
            .await
            .context(
                "the control nodes do not elect a leader; see their logs below the data directory",
            )?;
        say("Control nodes agree on a leader");
        self.set_up(control).await?;
        self.remove_former(control).await;
        let before = state.last_epoch;
        self.wait_until_ready(control, Epoch(before)).await?;
        say(&format!(
            "Ready after {:.1} s",
            started.elapsed().as_secs_f32()
        ));
        println!();
        println!("  Page and API   http://{}", self.gateway);
        println!(
            "  Sign in        http://{}/#key={}",
            self.gateway, self.keys.api_key
        );
        println!("  Keys           {}", self.data.join("demo.json").display());
        println!("  Stop           Ctrl-C");
        println!();
        if let Some(folder) = &self.examples {
            examples::upload(&operator, &tenant()?, folder, &self.data.join("uploaded")).await;
        }
        Ok(())
    }

    /// Tenant, keys and models; what is there already stays.
    async fn set_up(&self, control: &ControlHandle) -> Result<()> {
        let id = tenant()?;
        let name = TENANT_NAME.to_owned();
        propose(
            control,
            Command::CreateTenant {
                id: id.clone(),
                name,
                now_ms: now_ms(),
            },
        )
        .await?;
        for (secret, name, admin) in [
            (&self.keys.api_key, "demo", false),
            (&self.keys.admin_api_key, "demo-admin", true),
        ] {
            let key = api_key_from(secret.clone(), id.clone(), name, admin, now_ms());
            propose(
                control,
                Command::CreateApiKey {
                    sha256: key.sha256,
                    key: key.key,
                },
            )
            .await?;
        }
        // The embedder first: a gateway must not call the cluster ready before it knows that it shall have one.
        let embedder = self.served.embed.as_deref();
        let mut wanted: Vec<_> = embedder
            .map(|path| deployment(path, ModelKind::Embed, 1))
            .into_iter()
            .collect();
        wanted.push(deployment(
            &self.served.generate,
            ModelKind::Generate,
            self.served.ranks,
        ));
        let state = control.read().await?;
        // What an earlier `up` served of the same kind gives way; models that were added besides stay.
        let note = self.data.join("served");
        let earlier = std::fs::read_to_string(&note).unwrap_or_default();
        for model in earlier
            .lines()
            .filter(|m| !wanted.iter().any(|w| w.model == *m))
        {
            if state.deployments.contains_key(model) {
                propose(
                    control,
                    Command::RemoveDeployment {
                        model: model.to_owned(),
                    },
                )
                .await?;
            }
        }
        for deployment in &wanted {
            if state.deployments.get(&deployment.model) != Some(deployment) {
                propose(control, Command::SetDeployment(deployment.clone())).await?;
            }
        }
        let lines: String = wanted.iter().map(|w| format!("{}\n", w.model)).collect();
        if let Err(error) = super::write_whole(&note, lines.as_bytes(), 0o600) {
            say(&format!(
                "A later start with another model will keep this one too: {error:#}"
            ));
        }
        Ok(())
    }

    /// Workers of an earlier start with more ranks leave the cluster; what does not work now is done at the next start.
    async fn remove_former(&self, control: &ControlHandle) {
        for former in &self.former {
            match remove(control, &self.data, former).await {
                Ok(()) => say(&format!("{} is no longer a member", former.name)),
                Err(error) => say(&format!("{} cannot be removed: {error:#}", former.name)),
            }
        }
    }

    async fn wait_until_ready(&self, control: &ControlHandle, before: Epoch) -> Result<()> {
        let mut failures = BTreeSet::new();
        let mut told = BTreeSet::new();
        let mut explained = Instant::now();
        loop {
            let state = control.state();
            for group in state.groups.values() {
                if group.state == GroupState::Ready && told.insert((group.id, group.epoch)) {
                    say(&format!(
                        "{} is loaded on {} rank(s)",
                        group.model,
                        group.ranks.len()
                    ));
                }
                if let GroupState::Failed { reason } = &group.state
                    && group.epoch > before
                {
                    failures.insert((group.id, group.epoch));
                    if failures.iter().filter(|(id, _)| *id == group.id).count()
                        >= HOPELESS_FORMINGS
                    {
                        bail!("{} cannot be served: {reason}", group.model);
                    }
                }
            }
            let answer = ready(self.gateway).await;
            if answer.starts_with("HTTP/1.1 200") {
                return Ok(());
            }
            if explained.elapsed() > EXPLAIN_EVERY {
                explained = Instant::now();
                say(&format!("Waiting: {}", explain(&state, &answer)));
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

fn tenant() -> Result<TenantId> {
    Ok(TenantId::new(DEMO_TENANT)?)
}

fn deployment(path: &Path, kind: ModelKind, ranks: u32) -> Deployment {
    let path_text = path.display().to_string();
    Deployment {
        model: models::id_of(path),
        kind,
        path: path_text,
        ranks,
        context_tokens: 0,
    }
}

/// Proposes something that an earlier start may have done already.
async fn propose(control: &ControlHandle, command: Command) -> Result<()> {
    match control.propose(command).await {
        Ok(_) | Err(Error::Rejected(Rejection::Exists { .. })) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

async fn remove(control: &ControlHandle, data: &Path, former: &Former) -> Result<()> {
    layout::note_removed(data, former.id)?;
    match control
        .propose(Command::RemoveNode { node: former.id })
        .await
    {
        // It never registered, or an earlier start got so far.
        Ok(_) | Err(Error::Rejected(Rejection::Unknown { .. })) => {}
        Err(error) => return Err(error.into()),
    }
    std::fs::remove_dir_all(&former.dir)
        .with_context(|| format!("cannot delete {}", former.dir.display()))
}

/// What is still missing, in a line.
fn explain(state: &ControlState, answer: &str) -> String {
    let group = |g: &Group| match &g.state {
        GroupState::Forming => Some(format!("{} is loading", g.model)),
        GroupState::Failed { reason } => Some(format!("{}: {reason}", g.model)),
        GroupState::Ready => None,
    };
    let mut parts: Vec<_> = state.groups.values().filter_map(group).collect();
    let unformed = state
        .deployments
        .keys()
        .filter(|m| state.group_of(m).is_none());
    parts.extend(unformed.map(|m| format!("{m} waits for workers")));
    if parts.is_empty() {
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default().trim();
        parts.push(if body.is_empty() {
            "the gateway does not answer yet".to_owned()
        } else {
            body.to_owned()
        });
    }
    parts.join("; ")
}

/// The gateway's answer to `GET /ready`, empty when there is none.
async fn ready(gateway: SocketAddr) -> String {
    let ask = async {
        let mut stream = TcpStream::connect(gateway).await?;
        let request =
            format!("GET /ready HTTP/1.1\r\nHost: {gateway}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(64 * 1024).read_to_end(&mut answer).await?;
        std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    timeout(Duration::from_secs(2), ask)
        .await
        .ok()
        .and_then(Result::ok)
        .unwrap_or_default()
}
