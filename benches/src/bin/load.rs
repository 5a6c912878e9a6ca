//! Loads a server with OpenAI's HTTP interface and reports what its clients saw.
//!
//! Open loop, two tenants, a minute, with a picture:
//! `load --url http://127.0.0.1:8080 --model M --tenant a:KEY:open=0.5 --tenant b:KEY:closed=4 --seconds 60 --svg load.svg`

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use benches::load::prompts::Mix;
use benches::load::{Arrivals, Bounds, Endpoint, Plan, Summary, Target, TenantPlan, picture, run};
use clap::Parser;

#[derive(Parser)]
#[command(
    after_help = "Example:\n  load --url http://127.0.0.1:8080 --model smollm2 --tenant a:$KEY:open=2 --seconds 60 --json"
)]
struct Options {
    /// Address of the server, without /v1
    #[arg(long)]
    url: String,
    /// Load a server on another machine
    #[arg(long)]
    anywhere: bool,
    #[arg(long)]
    model: String,
    #[arg(long, value_enum, default_value = "chat")]
    endpoint: Endpoint,
    /// NAME:KEY:open=REQUESTS_PER_SECOND or NAME:KEY:closed=CLIENTS; the key may be empty; once for each tenant
    #[arg(long = "tenant", value_parser = tenant, required = true)]
    tenants: Vec<TenantPlan>,
    /// Prompts and answers of these lengths in tokens, as in 132,64; without it a town hall's mix
    #[arg(long, value_parser = lengths)]
    fixed: Option<(usize, usize)>,
    /// Multiplies the lengths of the town hall's mix
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Part of the requests whose client goes away in the middle
    #[arg(long, default_value_t = 0.0)]
    cancelled: f64,
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Longest wait for answers after that
    #[arg(long, default_value_t = 120)]
    drain_s: u64,
    #[arg(long, default_value_t = 100_000)]
    max_requests: usize,
    #[arg(long, default_value_t = 2_000)]
    max_in_flight: usize,
    /// Bounds of a good answer: seconds to the first token, mean seconds between tokens
    #[arg(long, default_value_t = 2.0)]
    first_token_s: f64,
    #[arg(long, default_value_t = 0.2)]
    between_tokens_s: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
    /// Write the distribution of the time to the first token
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn tenant(text: &str) -> Result<TenantPlan> {
    let parts: Vec<&str> = text.split(':').collect();
    let &[name, key, arrivals] = parts.as_slice() else {
        bail!("{text}: expected NAME:KEY:open=RATE or NAME:KEY:closed=CLIENTS");
    };
    let arrivals = match arrivals.split_once('=') {
        Some(("open", rate)) => {
            let per_s: f64 = rate.parse().context("the rate is no number")?;
            if !(per_s.is_finite() && per_s > 0.0) {
                bail!("{text}: expected a rate above 0, got {per_s}");
            }
            Arrivals::Open { per_s }
        }
        Some(("closed", clients)) => Arrivals::Closed {
            clients: clients
                .parse()
                .context("the number of clients is no number")?,
        },
        _ => bail!("{text}: expected open=RATE or closed=CLIENTS, got {arrivals}"),
    };
    Ok(TenantPlan {
        name: name.into(),
        key: key.into(),
        arrivals,
        mix: Mix::town_hall(),
        cancelled: 0.0,
    })
}

fn lengths(text: &str) -> Result<(usize, usize)> {
    let (prompt, answer) = text.split_once(',').context("expected PROMPT,ANSWER")?;
    Ok((prompt.parse()?, answer.parse()?))
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let mix = match options.fixed {
        Some((prompt, answer)) => Mix::fixed(prompt, answer),
        None => Mix::town_hall().scaled(options.scale),
    };
    let tenants = options.tenants.into_iter().map(|tenant| TenantPlan {
        mix: mix.clone(),
        cancelled: options.cancelled,
        ..tenant
    });
    let plan = Plan {
        target: Target::new(
            &options.url,
            &options.model,
            options.endpoint,
            options.anywhere,
        )?,
        tenants: tenants.collect(),
        duration: Duration::from_secs(options.seconds),
        drain: Duration::from_secs(options.drain_s),
        max_requests: options.max_requests,
        max_in_flight: options.max_in_flight,
        bounds: Bounds {
            first_token_s: options.first_token_s,
            between_tokens_s: options.between_tokens_s,
        },
        seed: options.seed,
    };
    let records = run(&plan).await?;
    let summary = Summary::of(&plan, &records);
    if let Some(path) = options.svg {
        let svg = picture::first_tokens("Time to the first token", &plan, &records)?;
        std::fs::write(&path, svg).with_context(|| format!("{}", path.display()))?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print!("{summary}");
    }
    Ok(())
}
