//! The forward pass of one rank.

use kernels::{Device, Rope, SeqSpan};

use super::{Error, StepBatch};
use crate::collective::Collective;
use crate::file::{ModelConfig, ModelFile};
use crate::load::{self, ShardNumbers, Weights};
use crate::plan::{Shard, ShardPlan};

/// A rank's part of a llama, with its KV cache.
pub struct Model<D: Device> {
    config: ModelConfig,
    device: D,
    weights: Weights<D>,
    kv: D::Kv,
    rope: Rope,
    shard: Shard,
    room: Workspace<D>,
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
    /// This rank's contribution to the residual stream, then all ranks', exactly.
    sum: Vec<f64>,
    /// Rows whose logits are wanted, `[rows, hidden]`.
    wanted: D::Buf,
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
        let room = Workspace::new(&device, &config, &shard, 1)?;
        Ok(Model {
            config,
            device,
            weights,
            kv,
            rope,
            shard,
            room,
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

    /// One step: logits of this rank's part of the vocabulary, `[batch.logits_rows, shard.vocab_rows]`. `batch` was checked.
    pub fn forward(
        &mut self,
        batch: &StepBatch,
        group: &mut dyn Collective,
    ) -> Result<&[f32], Error> {
        let Model {
            config,
            device,
            weights,
            kv,
            rope,
            shard,
            room,
        } = self;
        let rows = batch.tokens.len();
        if rows > room.rows {
            *room = Workspace::new(device, config, shard, rows.next_power_of_two())?;
        }
        let spans: Vec<SeqSpan<'_>> = batch
            .spans
            .iter()
            .map(|s| SeqSpan {
                first_row: s.first_row,
                rows: s.rows,
                context: s.context,
                blocks: &s.blocks,
            })
            .collect();

        embed(device, config, weights, shard, room, &batch.tokens, group)?;
        for (index, layer) in weights.layers.iter().enumerate() {
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
            device.rope(
                &mut room.q,
                rows,
                shard.query_heads.len(),
                &batch.positions,
                rope,
            );
            device.rope(
                &mut room.k,
                rows,
                shard.kv_heads.len(),
                &batch.positions,
                rope,
            );
            device.kv_write(kv, index, &room.k, &room.v, &batch.slots);
            device.attention(
                &room.q,
                kv,
                index,
                shard.query_heads.len(),
                &spans,
                &mut room.attended,
            );
            let sum = &mut room.sum[..rows * config.hidden];
            let parts: Vec<&D::Matrix> = layer.attention_output.iter().collect();
            device.matmul_sum(&parts, &room.attended, rows, sum);
            group.all_reduce_f64(sum)?;
            device.add_sum(&mut room.x, sum);

            device.rms_norm(&room.x, &layer.ffn_norm, rows, config.eps, &mut room.normed);
            device.matmul(
                &[&layer.gate, &layer.up],
                &room.normed,
                rows,
                &mut [&mut room.gate, &mut room.up],
            );
            device.silu_gate(&mut room.gate, &room.up, rows * shard.ffn_columns.len());
            let sum = &mut room.sum[..rows * config.hidden];
            let parts: Vec<&D::Matrix> = layer.down.iter().collect();
            device.matmul_sum(&parts, &room.gate, rows, sum);
            group.all_reduce_f64(sum)?;
            device.add_sum(&mut room.x, sum);
        }
        logits(device, config, weights, shard, room, &batch.logits_rows)
    }
}

/// `x = embedding[tokens]`: the rank that has a token's row contributes it, the others zeros.
fn embed<D: Device>(
    device: &D,
    config: &ModelConfig,
    weights: &Weights<D>,
    shard: &Shard,
    room: &mut Workspace<D>,
    tokens: &[u32],
    group: &mut dyn Collective,
) -> Result<(), Error> {
    let len = tokens.len() * config.hidden;
    if let Some(table) = &weights.embedding {
        // A token of another rank wraps to an id beyond the table, which the device reads as zeros.
        let ids: Vec<u32> = tokens
            .iter()
            .map(|&t| t.wrapping_sub(shard.vocab_rows.start as u32))
            .collect();
        device.embed(table, &ids, &mut room.x, 0);
    }
    if group.size() == 1 {
        return Ok(());
    }
    room.host.resize(len, 0.0);
    if weights.embedding.is_some() {
        device.download(&room.x, 0, &mut room.host);
    } else {
        room.host.fill(0.0);
    }
    // One contribution and zeros: exact without the grid.
    for (sum, &v) in room.sum.iter_mut().zip(&room.host) {
        *sum = f64::from(v);
    }
    group.all_reduce_f64(&mut room.sum[..len])?;
    for (v, &sum) in room.host.iter_mut().zip(&room.sum) {
        *v = sum as f32;
    }
    device.upload(&room.host, &mut room.x, 0);
    Ok(())
}

/// Logits of the wanted rows over this rank's part of the vocabulary.
fn logits<'a, D: Device>(
    device: &D,
    config: &ModelConfig,
    weights: &Weights<D>,
    shard: &Shard,
    room: &'a mut Workspace<D>,
    rows: &[u32],
) -> Result<&'a [f32], Error> {
    let (hidden, len) = (config.hidden, rows.len() * shard.vocab_rows.len());
    let Some(matrix) = weights
        .output
        .as_ref()
        .or(weights.embedding.as_ref())
        .filter(|_| !rows.is_empty())
    else {
        return Ok(&[]);
    };
    room.host.resize(hidden.max(room.host.len()), 0.0);
    for (i, &wanted) in rows.iter().enumerate() {
        let row = &mut room.host[..hidden];
        device.download(&room.x, wanted as usize * hidden, row);
        device.upload(row, &mut room.wanted, i * hidden);
    }
    device.rms_norm(
        &room.wanted,
        &weights.output_norm,
        rows.len(),
        config.eps,
        &mut room.normed,
    );
    if len > room.logits_len {
        room.logits = device.alloc(len)?;
        room.logits_len = len;
    }
    device.matmul(&[matrix], &room.normed, rows.len(), &mut [&mut room.logits]);
    if device.host(&room.logits).is_none() {
        room.host.resize(len.max(room.host.len()), 0.0);
        device.download(&room.logits, 0, &mut room.host[..len]);
    }
    let all = device.host(&room.logits).unwrap_or(&room.host);
    Ok(&all[..len])
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
            wanted: buffer(config.hidden)?,
            logits: device.alloc(0)?,
            logits_len: 0,
            host: Vec::new(),
        })
    }
}
