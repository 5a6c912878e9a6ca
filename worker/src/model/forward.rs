//! The forward pass of one rank.
//!
//! Where sums over ranks travel over a network, the rows of a prefill step go through the layers in two halves: while one half's sum
//! is under way, the other half is computed. A row's result does not depend on its company, so that changes no bit.

use std::ops::Range;

use kernels::{Device, Rope, SeqSpan};

use super::candidates::{self, Part};
use super::{Error, StepBatch};
use crate::collective::Collective;
use crate::file::{ModelConfig, ModelFile};
use crate::load::{self, InParts, ShardNumbers, Weights};
use crate::plan::{Shard, ShardPlan};

/// Fewest rows that go in two halves: below, reading the weights twice costs more than waiting once.
const HALVED_ROWS: usize = 64;
/// Halves are whole tiles of the kernels.
const TILE_ROWS: usize = 16;

/// A rank's part of a llama, with its KV cache.
pub struct Model<D: Device> {
    config: ModelConfig,
    device: D,
    weights: Weights<D>,
    kv: D::Kv,
    rope: Rope,
    shard: Shard,
    /// Of all rows, or of each half.
    rooms: [Workspace<D>; 2],
}

/// Some consecutive rows of a step.
struct Rows<'a> {
    tokens: &'a [u32],
    positions: &'a [u32],
    slots: &'a [u32],
    spans: Vec<SeqSpan<'a>>,
}

/// Activations. Grows with the largest step seen.
struct Workspace<D: Device> {
    rows: usize,
    /// The residual stream, `[rows, hidden]`.
    x: D::Buf,
    normed: D::Buf,
    q: D::Buf,
    k: D::Buf,
    v: D::Buf,
    attended: D::Buf,
    gate: D::Buf,
    up: D::Buf,
    /// This rank's contribution to the residual stream, then all ranks'. Away while it is summed in the background.
    sum: Vec<f64>,
    under_way: bool,
    /// Rows whose logits are wanted, `[wanted_rows, hidden]`, and the same normed.
    wanted: D::Buf,
    wanted_normed: D::Buf,
    wanted_rows: usize,
    /// Their logits, `[rows, vocab]`; grows with the most wanted so far.
    logits: D::Buf,
    logits_len: usize,
    host: Vec<f32>,
}

impl<D: Device> Model<D> {
    /// Packs shard `rank` of the plan and sets up its KV cache.
    pub fn load(
        file: &ModelFile,
        plan: &ShardPlan,
        rank: usize,
        device: D,
    ) -> Result<Model<D>, Error> {
        let config = file.config()?;
        let shard = plan
            .shards
            .get(rank)
            .ok_or(Error::WrongGroup {
                planned: plan.shards.len(),
                ranks: rank + 1,
            })?
            .clone();
        let weights = load::load(file, &config, plan, &shard, &device)?;
        let kv = device.kv_alloc(
            plan.kv_format,
            config.layers,
            shard.kv_heads.len(),
            config.head_dim,
            plan.kv_blocks,
        )?;
        let rope = Rope {
            head_dim: config.head_dim,
            inv_freq: config.inv_freq(),
            interleaved: config.rope_interleaved,
        };
        let room = || Workspace::new(&device, &config, &shard, 1);
        let rooms = [room()?, room()?];
        Ok(Model {
            config,
            device,
            weights,
            kv,
            rope,
            shard,
            rooms,
        })
    }

    /// The whole model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What this rank holds.
    pub fn numbers(&self, context_tokens: usize) -> ShardNumbers {
        ShardNumbers {
            query_heads: self.shard.query_heads.clone(),
            kv_heads: self.shard.kv_heads.clone(),
            ffn_columns: self.shard.ffn_columns.clone(),
            vocab_rows: self.shard.vocab_rows.clone(),
            layers: self.config.layers,
            weight_bytes: self.weights.weight_bytes,
            mapped_bytes: self.weights.mapped_bytes,
            kv_bytes: self.device.kv_bytes(&self.kv) as u64,
            context_tokens,
        }
    }

    /// One step: what this rank's part of the vocabulary gives for each of `batch.logits_rows`. `batch` was checked.
    pub fn forward(
        &mut self,
        batch: &StepBatch,
        group: &mut dyn Collective,
    ) -> Result<Vec<Part>, Error> {
        let count = batch.tokens.len();
        let cut = if count >= HALVED_ROWS && group.background().is_some() {
            (count / 2).next_multiple_of(TILE_ROWS)
        } else {
            count
        };
        let parts = [Rows::of(batch, 0..cut), Rows::of(batch, cut..count)];
        let halved = cut < count;
        let parts = if halved { &parts[..] } else { &parts[..1] };
        for (room, part) in self.rooms.iter_mut().zip(parts) {
            let rows = part.tokens.len();
            if rows > room.rows {
                let rows = rows.next_power_of_two();
                *room = Workspace::new(&self.device, &self.config, &self.shard, rows)?;
            }
            // Nothing is under way any more of a step that failed.
            room.under_way = false;
            room.sum.resize(rows * self.config.hidden, 0.0);
        }

        for (half, part) in parts.iter().enumerate() {
            self.embed(half, part.tokens, group)?;
        }
        for layer in 0..self.weights.layers.len() {
            for (half, part) in parts.iter().enumerate() {
                self.settle(half, group)?;
                self.attention(layer, half, part);
                self.add_up(half, halved, group)?;
            }
            for (half, part) in parts.iter().enumerate() {
                self.settle(half, group)?;
                self.feed_forward(layer, half, part);
                self.add_up(half, halved, group)?;
            }
        }
        for half in 0..parts.len() {
            self.settle(half, group)?;
        }
        self.logits(cut, &batch.logits_rows)?;
        let (logits, vocab) = (&self.rooms[0].logits, &self.shard.vocab_rows);
        Ok(candidates::parts(
            &self.device,
            logits,
            vocab.clone(),
            batch,
        ))
    }

    /// `sum = attention(norm(x)) · output`, this rank's heads' part of it.
    fn attention(&mut self, index: usize, half: usize, part: &Rows<'_>) {
        let (config, device, shard) = (&self.config, &self.device, &self.shard);
        let (layer, room) = (&self.weights.layers[index], &mut self.rooms[half]);
        let rows = part.tokens.len();
        let (heads, kv_heads) = (shard.query_heads.len(), shard.kv_heads.len());
        device.rms_norm(
            &room.x,
            &layer.attention_norm,
            rows,
            config.eps,
            &mut room.normed,
        );
        device.matmul(
            &[&layer.query, &layer.key, &layer.value],
            &room.normed,
            rows,
            &mut [&mut room.q, &mut room.k, &mut room.v],
        );
        device.rope(&mut room.q, rows, heads, part.positions, &self.rope);
        device.rope(&mut room.k, rows, kv_heads, part.positions, &self.rope);
        device.kv_write(&mut self.kv, index, &room.k, &room.v, part.slots);
        device.attention(
            &room.q,
            &self.kv,
            index,
            heads,
            &part.spans,
            &mut room.attended,
        );
        let output = layer.attention_output.as_ref();
        sum_parts(device, output, &room.attended, rows, &mut room.sum);
    }

    /// `sum = (silu(norm(x) · gate) * norm(x) · up) · down`, this rank's columns' part of it.
    fn feed_forward(&mut self, index: usize, half: usize, part: &Rows<'_>) {
        let (config, device, shard) = (&self.config, &self.device, &self.shard);
        let (layer, room) = (&self.weights.layers[index], &mut self.rooms[half]);
        let rows = part.tokens.len();
        device.rms_norm(&room.x, &layer.ffn_norm, rows, config.eps, &mut room.normed);
        device.matmul(
            &[&layer.gate, &layer.up],
            &room.normed,
            rows,
            &mut [&mut room.gate, &mut room.up],
        );
        device.silu_gate(&mut room.gate, &room.up, rows * shard.ffn_columns.len());
        sum_parts(device, layer.down.as_ref(), &room.gate, rows, &mut room.sum);
    }

    /// Adds all ranks' sums to the residual stream, now or in [`Model::settle`].
    fn add_up(
        &mut self,
        half: usize,
        later: bool,
        group: &mut dyn Collective,
    ) -> Result<(), Error> {
        let room = &mut self.rooms[half];
        if later && let Some(background) = group.background() {
            background.begin(std::mem::take(&mut room.sum))?;
            room.under_way = true;
            return Ok(());
        }
        group.all_reduce_f64(&mut room.sum)?;
        self.device.add_sum(&mut room.x, &room.sum);
        Ok(())
    }

    /// Finishes what [`Model::add_up`] left for later.
    fn settle(&mut self, half: usize, group: &mut dyn Collective) -> Result<(), Error> {
        let room = &mut self.rooms[half];
        if room.under_way
            && let Some(background) = group.background()
        {
            room.sum = background.finish()?;
            room.under_way = false;
            self.device.add_sum(&mut room.x, &room.sum);
        }
        Ok(())
    }

    /// `x = embedding[tokens]`: the rank that has a token's row contributes it, the others zeros.
    fn embed(
        &mut self,
        half: usize,
        tokens: &[u32],
        group: &mut dyn Collective,
    ) -> Result<(), Error> {
        let (device, room) = (&self.device, &mut self.rooms[half]);
        if let Some(table) = &self.weights.embedding {
            // A token of another rank wraps to an id beyond the table, which the device reads as zeros.
            let ids: Vec<u32> = tokens
                .iter()
                .map(|&t| t.wrapping_sub(self.shard.vocab_rows.start as u32))
                .collect();
            device.embed(table, &ids, &mut room.x, 0);
        }
        if group.size() == 1 {
            return Ok(());
        }
        room.host.resize(room.sum.len().max(room.host.len()), 0.0);
        let host = &mut room.host[..room.sum.len()];
        if self.weights.embedding.is_some() {
            device.download(&room.x, 0, host);
        } else {
            host.fill(0.0);
        }
        // One contribution and zeros: exact without the grid, and small on the wire without rounding.
        for (sum, &v) in room.sum.iter_mut().zip(&*host) {
            *sum = f64::from(v);
        }
        group.all_reduce_exact(&mut room.sum)?;
        for (v, &sum) in host.iter_mut().zip(&room.sum) {
            *v = sum as f32;
        }
        device.upload(host, &mut room.x, 0);
        Ok(())
    }

    /// Computes the logits of the wanted rows, of which those from `cut` on lie in the second half, over this rank's part of the
    /// vocabulary: `[rows, shard.vocab_rows]`.
    fn logits(&mut self, cut: usize, rows: &[u32]) -> Result<(), Error> {
        let (device, hidden) = (&self.device, self.config.hidden);
        let len = rows.len() * self.shard.vocab_rows.len();
        let weights = &self.weights;
        let Some(matrix) = weights
            .output
            .as_ref()
            .or(weights.embedding.as_ref())
            .filter(|_| !rows.is_empty())
        else {
            return Ok(());
        };
        let [first, second] = &mut self.rooms;
        first.host.resize(hidden.max(first.host.len()), 0.0);
        if rows.len() > first.wanted_rows {
            // Grows with the most wanted so far, which are mostly few.
            let rows = rows.len().next_power_of_two();
            first.wanted = device.alloc(rows * hidden)?;
            first.wanted_normed = device.alloc(rows * hidden)?;
            first.wanted_rows = rows;
        }
        for (i, &wanted) in rows.iter().enumerate() {
            let row = &mut first.host[..hidden];
            let wanted = wanted as usize;
            match wanted.checked_sub(cut) {
                None => device.download(&first.x, wanted * hidden, row),
                Some(wanted) => device.download(&second.x, wanted * hidden, row),
            }
            device.upload(row, &mut first.wanted, i * hidden);
        }
        device.rms_norm(
            &first.wanted,
            &weights.output_norm,
            rows.len(),
            self.config.eps,
            &mut first.wanted_normed,
        );
        if len > first.logits_len {
            first.logits = device.alloc(len)?;
            first.logits_len = len;
        }
        device.matmul(
            &[matrix],
            &first.wanted_normed,
            rows.len(),
            &mut [&mut first.logits],
        );
        Ok(())
    }
}

impl<'a> Rows<'a> {
    /// The rows `rows` of a step, with spans counted from the first of them.
    fn of(batch: &'a StepBatch, rows: Range<usize>) -> Rows<'a> {
        let spans = batch.spans.iter().filter_map(|span| {
            let start = span.first_row.max(rows.start);
            let end = (span.first_row + span.rows).min(rows.end);
            (start < end).then(|| SeqSpan {
                first_row: start - rows.start,
                rows: end - start,
                context: span.context + (start - span.first_row),
                blocks: &span.blocks,
            })
        });
        Rows {
            tokens: &batch.tokens[rows.clone()],
            positions: &batch.positions[rows.clone()],
            slots: &batch.slots[rows.clone()],
            spans: spans.collect(),
        }
    }
}

/// This rank's share of a product that is summed over ranks: zeros where it has no columns.
fn sum_parts<D: Device>(
    device: &D,
    w: Option<&InParts<D>>,
    x: &D::Buf,
    rows: usize,
    sum: &mut [f64],
) {
    match w {
        Some(w) => device.matmul_sum(&w.matrix, &w.ends, x, rows, sum),
        None => sum.fill(0.0),
    }
}

impl<D: Device> Workspace<D> {
    fn new(device: &D, config: &ModelConfig, shard: &Shard, rows: usize) -> Result<Self, Error> {
        let buffer = |width: usize| device.alloc(rows * width);
        let heads = |count: usize| count * config.head_dim;
        let mut sum = Vec::new();
        let sums = rows * config.hidden;
        sum.try_reserve_exact(sums)
            .map_err(|_| kernels::Error::Memory {
                bytes: sums.saturating_mul(size_of::<f64>()),
                what: "sums over ranks",
            })?;
        sum.resize(sums, 0.0);
        Ok(Workspace {
            rows,
            x: buffer(config.hidden)?,
            normed: buffer(config.hidden)?,
            q: buffer(heads(shard.query_heads.len()))?,
            k: buffer(heads(shard.kv_heads.len()))?,
            v: buffer(heads(shard.kv_heads.len()))?,
            attended: buffer(heads(shard.query_heads.len()))?,
            gate: buffer(shard.ffn_columns.len())?,
            up: buffer(shard.ffn_columns.len())?,
            sum,
            under_way: false,
            wanted: device.alloc(0)?,
            wanted_normed: device.alloc(0)?,
            wanted_rows: 0,
            logits: device.alloc(0)?,
            logits_len: 0,
            host: Vec::new(),
        })
    }
}
