//! Runs a plan: sends what is due, and notes what came of each request.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout_at};

use super::client::{self, Answer, Ask};
use super::plan::{Arrivals, Plan, Request, Requests, schedule};

/// Longest that a single request may take.
const REQUEST_WITHIN: Duration = Duration::from_secs(900);

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Answered,
    /// The client went away on purpose.
    Cancelled,
    /// The server said no, with this HTTP status.
    Refused(u16),
    /// The connection or the stream broke.
    Broken(String),
    /// Not answered when the run ended; the first token counts as late as that, or later.
    Unanswered,
    /// Too many others were under way already.
    NotSent,
}

/// What came of one request. Times are seconds from the beginning of the run.
#[derive(Debug, Clone)]
pub struct Record {
    pub tenant: usize,
    /// When it should begin: latency counts from here.
    pub intended_s: f64,
    pub sent_s: f64,
    pub tokens_s: Vec<f64>,
    pub end_s: f64,
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub cached_tokens: usize,
    pub outcome: Outcome,
}

impl Record {
    /// Seconds from the intended beginning to the first token; at least so many where the run ended before it came.
    pub fn first_token_s(&self) -> Option<f64> {
        let first = self.tokens_s.first().copied();
        let late = (self.outcome == Outcome::Unanswered).then_some(self.end_s);
        Some(first.or(late)? - self.intended_s)
    }

    /// Seconds between neighbouring tokens.
    pub fn gaps_s(&self) -> impl Iterator<Item = f64> {
        self.tokens_s.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// Runs the plan to its end. Records come in the order in which requests ended.
pub async fn run(plan: &Plan) -> Result<Vec<Record>> {
    let shared = Arc::new(Shared {
        plan: plan.clone(),
        http: client::http(REQUEST_WITHIN)?,
        start: Instant::now(),
        in_flight: AtomicUsize::new(0),
        sent: AtomicUsize::new(0),
    });
    let mut tasks = JoinSet::new();
    for (tenant, t) in plan.tenants.iter().enumerate() {
        if let Arrivals::Closed { clients } = t.arrivals {
            for client in 0..clients {
                tasks.spawn(closed(shared.clone(), tenant, client as u64));
            }
        }
    }
    let open = schedule(&plan.tenants, plan.duration, plan.max_requests, plan.seed);
    let mut records = Vec::new();
    for request in open {
        let due = shared.start + Duration::from_secs_f64(request.at_s);
        sleep_until(due.into()).await;
        if shared.in_flight.load(Relaxed) >= plan.max_in_flight {
            let end_s = shared.now_s();
            records.push(shared.record(&request, request.at_s, end_s, Outcome::NotSent));
            continue;
        }
        shared.in_flight.fetch_add(1, Relaxed);
        let shared = shared.clone();
        tasks.spawn(async move {
            let intended_s = request.at_s;
            let record = shared.one(&request, intended_s).await;
            shared.in_flight.fetch_sub(1, Relaxed);
            vec![record]
        });
    }
    while let Some(done) = tasks.join_next().await {
        records.extend(done?);
    }
    records.sort_by(|a, b| a.end_s.total_cmp(&b.end_s));
    Ok(records)
}

struct Shared {
    plan: Plan,
    http: reqwest::Client,
    start: Instant,
    in_flight: AtomicUsize,
    /// Requests of the closed loops so far.
    sent: AtomicUsize,
}

/// One client that asks again as soon as it was answered.
async fn closed(shared: Arc<Shared>, tenant: usize, client: u64) -> Vec<Record> {
    let plan = &shared.plan;
    let mut records = Vec::new();
    for request in Requests::new(&plan.tenants[tenant], tenant, client + 1, plan.seed) {
        let over = shared.start.elapsed() >= plan.duration;
        if over || shared.sent.fetch_add(1, Relaxed) >= plan.max_requests {
            break;
        }
        let intended_s = shared.now_s();
        let record = shared.one(&request, intended_s).await;
        // A server that refuses at once would be asked in a loop without rest.
        if !matches!(record.outcome, Outcome::Answered | Outcome::Cancelled) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        records.push(record);
    }
    records
}

impl Shared {
    fn now_s(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    async fn one(&self, request: &Request, intended_s: f64) -> Record {
        let sent_s = self.now_s();
        let tenant = &self.plan.tenants[request.tenant];
        let ask = Ask {
            key: &tenant.key,
            prompt: &request.prompt,
            answer_tokens: request.answer_tokens,
            cancel_after: request.cancel_after,
            temperature: 0.0,
        };
        let mut answer = Answer::default();
        let asked = client::ask_into(&self.http, &self.plan.target, ask, &mut answer);
        let end = self.start + self.plan.duration + self.plan.drain;
        let outcome = match timeout_at(end.into(), asked).await {
            Ok(()) => outcome(&answer),
            Err(_) => Outcome::Unanswered,
        };
        let mut record = self.record(request, intended_s, self.now_s(), outcome);
        record.sent_s = sent_s;
        let since = |t: &Instant| t.duration_since(self.start).as_secs_f64();
        record.tokens_s = answer.tokens.iter().map(since).collect();
        record.prompt_tokens = answer.prompt_tokens.unwrap_or(0);
        record.completion_tokens = answer.completion_tokens.unwrap_or(answer.tokens.len());
        record.cached_tokens = answer.cached_tokens.unwrap_or(0);
        record
    }

    fn record(&self, request: &Request, intended_s: f64, end_s: f64, outcome: Outcome) -> Record {
        Record {
            tenant: request.tenant,
            intended_s,
            sent_s: intended_s,
            tokens_s: Vec::new(),
            end_s,
            prompt_tokens: 0,
            completion_tokens: 0,
            cached_tokens: 0,
            outcome,
        }
    }
}

fn outcome(answer: &Answer) -> Outcome {
    match answer {
        a if a.cancelled => Outcome::Cancelled,
        a if a.status != 0 && !(200..300).contains(&a.status) => Outcome::Refused(a.status),
        Answer {
            error: Some(error), ..
        } => Outcome::Broken(error.clone()),
        a if !a.complete => Outcome::Broken("the stream ended without [DONE]".into()),
        _ => Outcome::Answered,
    }
}
