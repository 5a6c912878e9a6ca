//! The forward pass of one rank.

use std::ops::Range;

use kernels::{Device, Rope, SeqSpan};

use super::{Error, StepBatch};
use crate::collective::{Collective, to_grid};
use crate::file::{ModelConfig, ModelFile};
use crate::load::{self, Layer, ShardNumbers, Weights};
use crate::plan::{Shard, ShardPlan};

/// A rank's part of a llama, with its KV cache.
pub struct Model<D: Device> {
    config: ModelConfig,
    device: D,
    weights: Weights<D>,
    kv: D::Kv,
    rope: Rope,
    shard: Shard,
    parts: Vec<Range<usize>>,
    room: Workspace<D>,
}

/// Activations. Grows with the largest step seen.
struct Workspace<D: Device> {
    rows: usize,
    hidden: usize,
    /// The residual stream, `[rows, hidden]`.
    x: D::Buf,
    normed: D::Buf,
    q: D::Buf,
    k: D::Buf,
    v: D::Buf,
    attended: D::Buf,
    /// The columns of `attended` that belong to one part.
    part: D::Buf,
    gates: Vec<D::Buf>,
    ups: Vec<D::Buf>,
    /// One part's contribution to the residual stream.
    out: D::Buf,
    /// Contributions summed up, exactly.
    sum: Vec<f64>,
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
        let parts = load::attention_parts(&config, &shard);
        let segments: Vec<usize> = plan.segments(&shard).map(|s| s.len()).collect();
        let room = Workspace::new(&device, &config, &shard, &parts, &segments, 1)?;
        Ok(Model {
            config,
            device,
            weights,
            kv,
            rope,
            shard,
            parts,
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
    ) -> Result<Vec<f32>, Error> {
        let Model {
            config,
            device,
            weights,
            kv,
            rope,
            shard,
            parts,
            room,
        } = self;
        let rows = batch.tokens.len();
        room.reserve(device, config, shard, parts, weights, rows)?;
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

        embed(device, weights, shard, room, &batch.tokens, group)?;
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
            project(device, layer, parts, room, rows);
            add_over_ranks(device, room, rows * config.hidden, group)?;

            device.rms_norm(&room.x, &layer.ffn_norm, rows, config.eps, &mut room.normed);
            feed_forward(device, layer, room, rows);
            add_over_ranks(device, room, rows * config.hidden, group)?;
        }
        logits(device, config, weights, shard, room, &batch.logits_rows)
    }
}

/// `x = embedding[tokens]`: the rank that has a token's row contributes it, the others zeros.
fn embed<D: Device>(
    device: &D,
    weights: &Weights<D>,
    shard: &Shard,
    room: &mut Workspace<D>,
    tokens: &[u32],
    group: &mut dyn Collective,
) -> Result<(), Error> {
    let len = tokens.len() * room.hidden;
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

/// `sum = attended · Woᵀ`, part by part.
fn project<D: Device>(
    device: &D,
    layer: &Layer<D>,
    parts: &[Range<usize>],
    room: &mut Workspace<D>,
    rows: usize,
) {
    let first_column = parts.first().map_or(0, |p| p.start);
    let width = parts.last().map_or(0, |p| p.end) - first_column;
    let len = rows * room.hidden;
    room.sum[..len].fill(0.0);
    for (columns, matrix) in parts.iter().zip(&layer.attention_output) {
        let columns = columns.start - first_column..columns.end - first_column;
        let whole = columns.len() == width;
        if !whole {
            take_columns(
                device,
                &room.attended,
                &mut room.part,
                rows,
                width,
                columns,
                &mut room.host,
            );
        }
        let input = if whole { &room.attended } else { &room.part };
        device.matmul(&[matrix], input, rows, &mut [&mut room.out]);
        accumulate(device, &room.out, &mut room.sum[..len], &mut room.host);
    }
}

/// `sum = (silu(normed · Gateᵀ) * (normed · Upᵀ)) · Downᵀ`, segment by segment.
fn feed_forward<D: Device>(device: &D, layer: &Layer<D>, room: &mut Workspace<D>, rows: usize) {
    let matrices: Vec<&D::Matrix> = layer
        .segments
        .iter()
        .flat_map(|s| [&s.gate, &s.up])
        .collect();
    let mut outs: Vec<&mut D::Buf> = room
        .gates
        .iter_mut()
        .zip(&mut room.ups)
        .flat_map(|(g, u)| [g, u])
        .collect();
    if !matrices.is_empty() {
        device.matmul(&matrices, &room.normed, rows, &mut outs);
    }
    let len = rows * room.hidden;
    room.sum[..len].fill(0.0);
    for ((segment, gate), up) in layer.segments.iter().zip(&mut room.gates).zip(&room.ups) {
        let (columns, _) = device.matrix_shape(&segment.gate);
        device.silu_gate(gate, up, rows * columns);
        device.matmul(&[&segment.down], gate, rows, &mut [&mut room.out]);
        accumulate(device, &room.out, &mut room.sum[..len], &mut room.host);
    }
}

/// `x += Σ over ranks of sum`.
fn add_over_ranks<D: Device>(
    device: &D,
    room: &mut Workspace<D>,
    len: usize,
    group: &mut dyn Collective,
) -> Result<(), Error> {
    group.all_reduce_f64(&mut room.sum[..len])?;
    if let Some(x) = device.host_mut(&mut room.x) {
        for (x, &sum) in x[..len].iter_mut().zip(&room.sum) {
            *x += sum as f32;
        }
        return Ok(());
    }
    room.host.clear();
    room.host.extend(room.sum[..len].iter().map(|&v| v as f32));
    device.upload(&room.host, &mut room.out, 0);
    device.add(&mut room.x, &room.out, len);
    Ok(())
}

/// Logits of the wanted rows over this rank's part of the vocabulary.
fn logits<D: Device>(
    device: &D,
    config: &ModelConfig,
    weights: &Weights<D>,
    shard: &Shard,
    room: &mut Workspace<D>,
    rows: &[u32],
) -> Result<Vec<f32>, Error> {
    let (hidden, vocab) = (config.hidden, shard.vocab_rows.len());
    let Some(matrix) = weights
        .output
        .as_ref()
        .or(weights.embedding.as_ref())
        .filter(|_| !rows.is_empty())
    else {
        return Ok(Vec::new());
    };
    let mut row = vec![0.0; hidden];
    for (i, &wanted) in rows.iter().enumerate() {
        device.download(&room.x, wanted as usize * hidden, &mut row);
        device.upload(&row, &mut room.out, i * hidden);
    }
    device.rms_norm(
        &room.out,
        &weights.output_norm,
        rows.len(),
        config.eps,
        &mut room.normed,
    );
    let mut buffer = device.alloc(rows.len() * vocab)?;
    device.matmul(&[matrix], &room.normed, rows.len(), &mut [&mut buffer]);
    let mut logits = vec![0.0; rows.len() * vocab];
    device.download(&buffer, 0, &mut logits);
    Ok(logits)
}

/// `part = from[.., columns]`.
fn take_columns<D: Device>(
    device: &D,
    from: &D::Buf,
    part: &mut D::Buf,
    rows: usize,
    width: usize,
    columns: Range<usize>,
    host: &mut Vec<f32>,
) {
    let count = columns.len();
    if let (Some(from), Some(part)) = (device.host(from), device.host_mut(part)) {
        for (from, part) in from
            .chunks_exact(width)
            .zip(part.chunks_exact_mut(count))
            .take(rows)
        {
            part.copy_from_slice(&from[columns.clone()]);
        }
        return;
    }
    host.resize(count, 0.0);
    for row in 0..rows {
        device.download(from, row * width + columns.start, host);
        device.upload(host, part, row * count);
    }
}

/// `sum += out`, on the grid that makes sums exact.
fn accumulate<D: Device>(device: &D, out: &D::Buf, sum: &mut [f64], host: &mut Vec<f32>) {
    let values = match device.host(out) {
        Some(values) => values,
        None => {
            host.resize(sum.len(), 0.0);
            device.download(out, 0, host);
            host.as_slice()
        }
    };
    for (sum, &value) in sum.iter_mut().zip(values) {
        *sum += to_grid(value);
    }
}

impl<D: Device> Workspace<D> {
    fn new(
        device: &D,
        config: &ModelConfig,
        shard: &Shard,
        parts: &[Range<usize>],
        segments: &[usize],
        rows: usize,
    ) -> Result<Self, Error> {
        let buffer = |width: usize| device.alloc(rows * width);
        let heads = |count: usize| count * config.head_dim;
        let widest = parts.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        Ok(Workspace {
            rows,
            hidden: config.hidden,
            x: buffer(config.hidden)?,
            normed: buffer(config.hidden)?,
            q: buffer(heads(shard.query_heads.len()))?,
            k: buffer(heads(shard.kv_heads.len()))?,
            v: buffer(heads(shard.kv_heads.len()))?,
            attended: buffer(heads(shard.query_heads.len()))?,
            part: buffer(widest)?,
            gates: segments
                .iter()
                .map(|&w| buffer(w))
                .collect::<Result<_, _>>()?,
            ups: segments
                .iter()
                .map(|&w| buffer(w))
                .collect::<Result<_, _>>()?,
            out: buffer(config.hidden)?,
            sum: vec![0.0; rows * config.hidden],
            host: Vec::new(),
        })
    }

    /// Makes room for `rows` rows.
    fn reserve(
        &mut self,
        device: &D,
        config: &ModelConfig,
        shard: &Shard,
        parts: &[Range<usize>],
        weights: &Weights<D>,
        rows: usize,
    ) -> Result<(), Error> {
        if rows > self.rows {
            let segments: Vec<usize> = weights
                .layers
                .first()
                .map(|l| {
                    l.segments
                        .iter()
                        .map(|s| device.matrix_shape(&s.gate).0)
                        .collect()
                })
                .unwrap_or_default();
            *self = Workspace::new(
                device,
                config,
                shard,
                parts,
                &segments,
                rows.next_power_of_two(),
            )?;
        }
        Ok(())
    }
}
