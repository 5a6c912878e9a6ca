//! The processor with a KV cache and attention in plain f32: what the cache in its formats is measured against.

use kernels::{
    Allowed, BLOCK_TOKENS, Cpu, Device, Error, Head, KvFormat, Rope, SeqSpan, WeightRows,
};

/// [`Cpu`], but keys and values are kept as they come.
pub struct ExactKv(pub Cpu);

/// Keys and values by layer and slot.
pub struct Kv {
    kv_heads: usize,
    head_dim: usize,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Device for ExactKv {
    type Buf = <Cpu as Device>::Buf;
    type Matrix = <Cpu as Device>::Matrix;
    type Kv = Kv;

    fn pack(&self, w: WeightRows<'_>) -> Result<Self::Matrix, Error> {
        self.0.pack(w)
    }
    fn matrix_bytes(&self, m: &Self::Matrix) -> usize {
        self.0.matrix_bytes(m)
    }
    fn matrix_shape(&self, m: &Self::Matrix) -> (usize, usize) {
        self.0.matrix_shape(m)
    }
    fn alloc(&self, len: usize) -> Result<Self::Buf, Error> {
        self.0.alloc(len)
    }
    fn upload(&self, src: &[f32], dst: &mut Self::Buf, offset: usize) {
        self.0.upload(src, dst, offset);
    }
    fn download(&self, src: &Self::Buf, offset: usize, dst: &mut [f32]) {
        self.0.download(src, offset, dst);
    }
    // No view of host memory, so that the path of devices with memory of their own is tested too.
    fn host<'a>(&self, _b: &'a Self::Buf) -> Option<&'a [f32]> {
        None
    }
    fn host_mut<'a>(&self, _b: &'a mut Self::Buf) -> Option<&'a mut [f32]> {
        None
    }
    fn matmul(&self, w: &[&Self::Matrix], x: &Self::Buf, rows: usize, out: &mut [&mut Self::Buf]) {
        self.0.matmul(w, x, rows, out);
    }
    fn embed(&self, table: &Self::Matrix, ids: &[u32], out: &mut Self::Buf, first_row: usize) {
        self.0.embed(table, ids, out, first_row);
    }
    fn rms_norm(
        &self,
        x: &Self::Buf,
        weight: &Self::Buf,
        rows: usize,
        eps: f32,
        out: &mut Self::Buf,
    ) {
        self.0.rms_norm(x, weight, rows, eps, out);
    }
    fn matmul_sum(
        &self,
        w: &Self::Matrix,
        ends: &[usize],
        x: &Self::Buf,
        rows: usize,
        sum: &mut [f64],
    ) {
        self.0.matmul_sum(w, ends, x, rows, sum);
    }
    fn add_sum(&self, x: &mut Self::Buf, sum: &[f64]) {
        self.0.add_sum(x, sum);
    }
    fn silu_gate(&self, gate: &mut Self::Buf, up: &Self::Buf, len: usize) {
        self.0.silu_gate(gate, up, len);
    }
    fn rope(&self, x: &mut Self::Buf, rows: usize, heads: usize, positions: &[u32], rope: &Rope) {
        self.0.rope(x, rows, heads, positions, rope);
    }

    fn kv_alloc(
        &self,
        _format: KvFormat,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        blocks: usize,
    ) -> Result<Kv, Error> {
        let layer = vec![0.0; blocks * BLOCK_TOKENS * kv_heads * head_dim];
        Ok(Kv {
            kv_heads,
            head_dim,
            keys: vec![layer.clone(); layers],
            values: vec![layer; layers],
        })
    }
    fn kv_bytes(&self, kv: &Kv) -> usize {
        kv.keys
            .iter()
            .chain(&kv.values)
            .map(|layer| layer.len() * 4)
            .sum()
    }
    fn kv_write(&self, kv: &mut Kv, layer: usize, k: &Self::Buf, v: &Self::Buf, slots: &[u32]) {
        let width = kv.kv_heads * kv.head_dim;
        for (row, &slot) in slots.iter().enumerate() {
            let place = slot as usize * width..(slot as usize + 1) * width;
            self.0
                .download(k, row * width, &mut kv.keys[layer][place.clone()]);
            self.0
                .download(v, row * width, &mut kv.values[layer][place]);
        }
    }
    fn attention(
        &self,
        q: &Self::Buf,
        kv: &Kv,
        layer: usize,
        heads: usize,
        seqs: &[SeqSpan<'_>],
        out: &mut Self::Buf,
    ) {
        let (dim, width) = (kv.head_dim, kv.kv_heads * kv.head_dim);
        let mut query = vec![0.0; dim];
        for seq in seqs {
            for row in 0..seq.rows {
                for head in 0..heads {
                    let at = ((seq.first_row + row) * heads + head) * dim;
                    self.0.download(q, at, &mut query);
                    let kv_head = head / (heads / kv.kv_heads);
                    let place = |position: usize| {
                        let slot = seq.blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS
                            + position % BLOCK_TOKENS;
                        slot * width + kv_head * dim..slot * width + (kv_head + 1) * dim
                    };
                    let score = |position: usize| -> f64 {
                        let key = &kv.keys[layer][place(position)];
                        key.iter()
                            .zip(&query)
                            .map(|(k, q)| f64::from(k * q))
                            .sum::<f64>()
                            / (dim as f64).sqrt()
                    };
                    let scores: Vec<f64> = (0..=seq.context + row).map(score).collect();
                    let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let mut sum = vec![0.0f64; dim];
                    for (position, weight) in weights.iter().enumerate() {
                        for (sum, value) in sum.iter_mut().zip(&kv.values[layer][place(position)]) {
                            *sum += weight / total * f64::from(*value);
                        }
                    }
                    let sum: Vec<f32> = sum.into_iter().map(|v| v as f32).collect();
                    self.0.upload(&sum, out, at);
                }
            }
        }
    }
    fn heads(
        &self,
        logits: &Self::Buf,
        width: usize,
        allowed: &[Option<Allowed<'_>>],
        k: usize,
    ) -> Vec<Head> {
        self.0.heads(logits, width, allowed, k)
    }
}
