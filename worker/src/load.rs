//! A rank packs its part of a model and touches nothing else of the file.
//!
//! Belongs here: which rows and columns of which tensor go where. Does not belong here: how a device lays them out (`kernels`).

use std::ops::Range;

use kernels::{Device, WeightRows};
use serde::{Deserialize, Serialize};

use crate::file::{self, LayerWeight, ModelConfig, ModelFile, Weight};
use crate::model::Error;
use crate::plan::{Shard, ShardPlan};

/// What a rank holds; ranges are half-open and in units of the whole model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardNumbers {
    pub query_heads: Range<usize>,
    pub kv_heads: Range<usize>,
    pub ffn_columns: Range<usize>,
    pub vocab_rows: Range<usize>,
    pub layers: usize,
    /// Bytes of the packed weights on the device.
    pub weight_bytes: u64,
    /// Bytes of the file that were read.
    pub mapped_bytes: u64,
    pub kv_bytes: u64,
    pub context_tokens: usize,
}

/// A rank's part of one layer.
pub struct Layer<D: Device> {
    pub attention_norm: D::Buf,
    /// This rank's heads' rows.
    pub query: D::Matrix,
    pub key: D::Matrix,
    pub value: D::Matrix,
    /// The output projection's columns, cut at each KV group.
    pub attention_output: Option<InParts<D>>,
    pub ffn_norm: D::Buf,
    /// This rank's feed-forward columns' rows.
    pub gate: D::Matrix,
    pub up: D::Matrix,
    /// The down projection's columns, cut into the plan's segments.
    pub down: Option<InParts<D>>,
}

/// Columns that a rank has of a matrix whose products are summed over ranks.
pub struct InParts<D: Device> {
    pub matrix: D::Matrix,
    /// Behind which column each canonical part ends.
    pub ends: Vec<usize>,
}

/// A rank's part of the model. Matrices of the vocabulary are absent where a rank has none of its rows.
pub struct Weights<D: Device> {
    pub layers: Vec<Layer<D>>,
    pub output_norm: D::Buf,
    pub embedding: Option<D::Matrix>,
    /// `None` where it is the embedding.
    pub output: Option<D::Matrix>,
    pub weight_bytes: u64,
    pub mapped_bytes: u64,
}

/// Packs the part of `shard`.
pub fn load<D: Device>(
    file: &ModelFile,
    config: &ModelConfig,
    plan: &ShardPlan,
    shard: &Shard,
    device: &D,
) -> Result<Weights<D>, Error> {
    let mut loader = Loader {
        file,
        device,
        weight_bytes: 0,
        mapped_bytes: 0,
    };
    let layers = (0..config.layers)
        .map(|layer| loader.layer(layer, config, plan, shard))
        .collect::<Result<Vec<_>, _>>()?;
    let output_norm = loader.vector(Weight::OutputNorm)?;
    let vocab = shard.vocab_rows.clone();
    let mut vocab_matrix = |weight| {
        if vocab.is_empty() {
            Ok(None)
        } else {
            loader
                .matrix(weight, vocab.clone(), 0..config.hidden)
                .map(Some)
        }
    };
    let embedding = vocab_matrix(Weight::Embedding)?;
    let output = if config.tied_embeddings {
        None
    } else {
        vocab_matrix(Weight::Output)?
    };
    for weight in [Weight::Embedding, Weight::Output] {
        file.release(file.weight(weight)?.data());
    }
    Ok(Weights {
        layers,
        output_norm,
        embedding,
        output,
        weight_bytes: loader.weight_bytes,
        mapped_bytes: loader.mapped_bytes,
    })
}

/// Columns of the attention output that belong to each canonical part of this shard: the smallest set of KV heads whose
/// columns end between quantisation blocks.
pub fn attention_parts(config: &ModelConfig, shard: &Shard) -> Vec<Range<usize>> {
    let width = config.group_heads() * config.head_dim;
    let step = config.sizes.kv_head_block.max(1);
    let heads = shard.kv_heads.clone();
    heads
        .clone()
        .step_by(step)
        .map(|head| head * width..(head + step).min(heads.end) * width)
        .collect()
}

struct Loader<'a, D: Device> {
    file: &'a ModelFile,
    device: &'a D,
    weight_bytes: u64,
    mapped_bytes: u64,
}

impl<D: Device> Loader<'_, D> {
    fn layer(
        &mut self,
        layer: usize,
        config: &ModelConfig,
        plan: &ShardPlan,
        shard: &Shard,
    ) -> Result<Layer<D>, Error> {
        let weight = |part| Weight::Layer(layer, part);
        let whole = 0..config.hidden;
        let rows =
            |heads: &Range<usize>| heads.start * config.head_dim..heads.end * config.head_dim;
        let (queries, keys) = (rows(&shard.query_heads), rows(&shard.kv_heads));
        let packed = Layer {
            attention_norm: self.vector(weight(LayerWeight::AttentionNorm))?,
            query: self.matrix(weight(LayerWeight::Query), queries, whole.clone())?,
            key: self.matrix(weight(LayerWeight::Key), keys.clone(), whole.clone())?,
            value: self.matrix(weight(LayerWeight::Value), keys, whole.clone())?,
            attention_output: self.in_parts(
                weight(LayerWeight::AttentionOutput),
                whole.clone(),
                &attention_parts(config, shard),
            )?,
            ffn_norm: self.vector(weight(LayerWeight::FfnNorm))?,
            gate: self.matrix(
                weight(LayerWeight::Gate),
                shard.ffn_columns.clone(),
                whole.clone(),
            )?,
            up: self.matrix(
                weight(LayerWeight::Up),
                shard.ffn_columns.clone(),
                whole.clone(),
            )?,
            down: self.in_parts(
                weight(LayerWeight::Down),
                whole.clone(),
                &plan.segments(shard).collect::<Vec<_>>(),
            )?,
        };
        // What is packed need not stay in memory twice.
        for part in file::LAYER_WEIGHTS {
            self.file.release(self.file.weight(weight(part))?.data());
        }
        Ok(packed)
    }

    fn vector(&mut self, weight: Weight) -> Result<D::Buf, Error> {
        let tensor = self.file.weight(weight)?;
        let values = tensor.to_f32()?;
        let mut buffer = self.device.alloc(values.len())?;
        self.device.upload(&values, &mut buffer, 0);
        self.mapped_bytes += tensor.data().len() as u64;
        self.weight_bytes += size_of_val(values.as_slice()) as u64;
        Ok(buffer)
    }

    /// The columns of `parts`, which follow one another; `None` where there are none.
    fn in_parts(
        &mut self,
        weight: Weight,
        rows: Range<usize>,
        parts: &[Range<usize>],
    ) -> Result<Option<InParts<D>>, Error> {
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else {
            return Ok(None);
        };
        let start = first.start;
        Ok(Some(InParts {
            matrix: self.matrix(weight, rows, start..last.end)?,
            ends: parts.iter().map(|part| part.end - start).collect(),
        }))
    }

    fn matrix(
        &mut self,
        weight: Weight,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<D::Matrix, Error> {
        let tensor = self.file.weight(weight)?;
        let format = tensor.format();
        tensor.check_finite(
            rows.clone(),
            format.row_bytes(columns.start)..format.row_bytes(columns.end),
        )?;
        self.mapped_bytes += (rows.len() * format.row_bytes(columns.len())) as u64;
        let part = WeightRows::new(format, tensor.rows(), tensor.cols(), tensor.data())
            .row_range(rows)?
            .columns(columns)?;
        let matrix = self.device.pack(part)?;
        self.weight_bytes += self.device.matrix_bytes(&matrix) as u64;
        Ok(matrix)
    }
}
