//! One rank of a group: its part of the model, its place among the others, and the step they take together.

use kernels::Device;
use serde::{Deserialize, Serialize};

use super::candidates::{self, Part};
use super::{Candidates, Error, MAX_STEP_ROWS, Model, StepBatch};
use crate::collective::{self, Collective, Interrupter};
use crate::file::{ModelConfig, ModelFile};
use crate::kv::BLOCK_TOKENS;
use crate::load::ShardNumbers;
use crate::plan::ShardPlan;

/// What the leader tells the followers.
#[derive(Serialize, Deserialize)]
enum Order {
    Step(StepBatch),
    /// Nothing to do; shows that the leader lives.
    Idle,
    Stop,
}

/// A loaded rank. On the leader, [`RankModel::step`] sends the step to the others and returns what the sampler needs; the others
/// sit in [`follow`].
pub struct RankModel<D: Device> {
    model: Model<D>,
    collective: Box<dyn Collective>,
    plan: ShardPlan,
    numbers: ShardNumbers,
}

impl<D: Device> RankModel<D> {
    /// Loads the shard of `collective.rank()`. Touches no other rank's part of the file.
    pub fn load(
        file: &ModelFile,
        plan: &ShardPlan,
        collective: Box<dyn Collective>,
        device: D,
    ) -> Result<RankModel<D>, Error> {
        if plan.shards.len() != collective.size() {
            return Err(Error::WrongGroup {
                planned: plan.shards.len(),
                ranks: collective.size(),
            });
        }
        let model = Model::load(file, plan, collective.rank(), device)?;
        let numbers = model.numbers(plan.context_tokens);
        Ok(RankModel {
            model,
            collective,
            plan: plan.clone(),
            numbers,
        })
    }

    /// The whole model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// The division this rank was loaded by: `kv_blocks`, `context_tokens`.
    pub fn plan(&self) -> &ShardPlan {
        &self.plan
    }

    /// What this rank holds, as the coordinator wants it reported.
    pub fn numbers(&self) -> &ShardNumbers {
        &self.numbers
    }

    /// This rank's number; 0 is the leader.
    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    /// Ends a waiting [`RankModel::step`] or [`follow`] from another thread.
    pub fn interrupter(&self) -> Interrupter {
        self.collective.interrupter()
    }

    /// Leader only: one step on all ranks; candidates for each of `batch.logits_rows`, in their order. After an error of kind
    /// [`Error::Collective`] the group is broken; after [`Error::Step`] nothing was sent and the group goes on.
    pub fn step(&mut self, batch: &StepBatch) -> Result<Option<Vec<Candidates>>, Error> {
        check(batch, self.model.config(), &self.plan)?;
        if self.collective.size() > 1 {
            self.tell(&Order::Step(batch.clone()))?;
        }
        self.compute(batch)
    }

    /// Leader only: shows the followers that the leader lives, and notices dead ones while nobody asks. Call it about once a
    /// second when there is nothing to do.
    pub fn idle(&mut self) -> Result<(), Error> {
        self.tell(&Order::Idle)
    }

    /// Leader only: tells the followers to leave [`follow`].
    pub fn stop(&mut self) -> Result<(), Error> {
        self.tell(&Order::Stop)
    }

    fn tell(&mut self, order: &Order) -> Result<(), Error> {
        if self.collective.size() == 1 {
            return Ok(());
        }
        let mut message = postcard::to_stdvec(order).map_err(|e| self.garbled(&e))?;
        Ok(self.collective.broadcast(&mut message)?)
    }

    fn compute(&mut self, batch: &StepBatch) -> Result<Option<Vec<Candidates>>, Error> {
        let parts = self.model.forward(batch, self.collective.as_mut())?;
        if self.collective.size() == 1 {
            return candidates::merge(vec![parts], batch.logits_rows.len()).map(Some);
        }
        if batch.logits_rows.is_empty() {
            return Ok((self.rank() == 0).then(Vec::new));
        }
        let mine = postcard::to_stdvec(&parts).map_err(|e| self.garbled(&e))?;
        let gathered = self.collective.gather_to_leader(&mine)?;
        if self.rank() != 0 {
            return Ok(None);
        }
        let parts = gathered
            .iter()
            .map(|bytes| postcard::from_bytes::<Vec<Part>>(bytes));
        let parts = parts
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| self.garbled(&e))?;
        candidates::merge(parts, batch.logits_rows.len()).map(Some)
    }

    fn garbled(&self, error: &postcard::Error) -> Error {
        let expected = "a message of this version".into();
        collective::Error::Protocol {
            rank: self.rank(),
            expected,
            got: error.to_string(),
        }
        .into()
    }
}

/// A follower's life: takes the leader's steps until it says stop, or until the group breaks.
pub fn follow<D: Device>(model: &mut RankModel<D>) -> Result<(), Error> {
    let mut message = Vec::new();
    loop {
        model.collective.broadcast(&mut message)?;
        match postcard::from_bytes(&message).map_err(|e| model.garbled(&e))? {
            Order::Step(batch) => {
                check(&batch, model.model.config(), &model.plan)?;
                model.compute(&batch)?;
            }
            Order::Idle => {}
            Order::Stop => return Ok(()),
        }
    }
}

/// Whether a step can be computed: nothing in it points outside the model or its cache.
fn check(batch: &StepBatch, config: &ModelConfig, plan: &ShardPlan) -> Result<(), Error> {
    let wrong = |what, expected: String, got: String| {
        Err(Error::Step {
            what,
            expected,
            got,
        })
    };
    let rows = batch.tokens.len();
    if !(1..=MAX_STEP_ROWS).contains(&rows) {
        return wrong(
            "number of rows",
            format!("1 to {MAX_STEP_ROWS}"),
            rows.to_string(),
        );
    }
    if batch.positions.len() != rows || batch.slots.len() != rows {
        return wrong(
            "number of positions and slots",
            rows.to_string(),
            format!("{} and {}", batch.positions.len(), batch.slots.len()),
        );
    }
    if let Some(token) = batch.tokens.iter().find(|&&t| t as usize >= config.vocab) {
        return wrong(
            "token",
            format!("an id below {}", config.vocab),
            token.to_string(),
        );
    }
    if batch.logits_rows.len() > rows || batch.logits_rows.iter().any(|&r| r as usize >= rows) {
        return wrong(
            "logits rows",
            format!("rows below {rows}, each once"),
            format!("{:?}", batch.logits_rows),
        );
    }
    let ordered = batch.wants.windows(2).all(|w| w[0].row < w[1].row);
    if !ordered || batch.wants.iter().any(|w| w.row >= batch.logits_rows.len()) {
        return wrong(
            "rows with wants of their own",
            format!("growing numbers below {}", batch.logits_rows.len()),
            format!(
                "{:?}",
                batch.wants.iter().map(|w| w.row).collect::<Vec<_>>()
            ),
        );
    }
    let mut next = 0;
    for span in &batch.spans {
        let end = span
            .first_row
            .checked_add(span.rows)
            .filter(|&end| span.first_row == next && end <= rows && span.rows > 0);
        let Some(end) = end else {
            return wrong(
                "span",
                format!("to begin at row {next} and end by {rows}"),
                format!("rows {} + {}", span.first_row, span.rows),
            );
        };
        let positions = span.context.saturating_add(span.rows);
        if positions > plan.context_tokens || positions.div_ceil(BLOCK_TOKENS) > span.blocks.len() {
            let room = plan.context_tokens.min(span.blocks.len() * BLOCK_TOKENS);
            return wrong(
                "length of a sequence",
                format!("at most {room} positions"),
                positions.to_string(),
            );
        }
        if let Some(block) = span.blocks.iter().find(|&&b| b as usize >= plan.kv_blocks) {
            return wrong(
                "KV block",
                format!("a number below {}", plan.kv_blocks),
                block.to_string(),
            );
        }
        for (row, position) in (next..end).zip(span.context..) {
            let slot = span.blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS
                + position % BLOCK_TOKENS;
            if batch.positions[row] as usize != position || batch.slots[row] as usize != slot {
                let got = format!("{} in {}", batch.positions[row], batch.slots[row]);
                return wrong(
                    "position and slot of a row",
                    format!("{position} in {slot}"),
                    got,
                );
            }
        }
        next = end;
    }
    if next != rows {
        return wrong("rows in spans", rows.to_string(), next.to_string());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
