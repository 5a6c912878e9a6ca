//! Vectors of one tenant, in memory: half-precision rows for an exact scan, and above [`EXACT_ROWS`] permitted rows a graph by
//! usearch. An exact scan of 8,192 rows of 384 components takes about 2 ms on one core; the graph would not be faster below.

use std::collections::HashMap;

use half::f16;
use half::slice::HalfFloatSliceExt;
use usearch::{IndexOptions, MetricKind, ScalarKind};

/// Up to so many permitted rows, every one is compared.
pub const EXACT_ROWS: usize = 8192;

/// Searches that the graph takes at once; each holds a slot, and one too many is answered by an exact scan.
const GRAPH_THREADS: usize = 64;

/// Rows of one length; the first one added decides which.
pub struct Vectors {
    dims: usize,
    keys: Vec<u64>,
    rows: Vec<f16>,
    /// Key → row.
    places: HashMap<u64, usize>,
    graph: Option<usearch::Index>,
    exact_rows: usize,
}

impl Default for Vectors {
    fn default() -> Self {
        Self::with_exact_rows(EXACT_ROWS)
    }
}

impl Vectors {
    /// As [`Vectors::default`] with another bound for the exact scan.
    pub fn with_exact_rows(exact_rows: usize) -> Self {
        Self {
            dims: 0,
            keys: Vec::new(),
            rows: Vec::new(),
            places: HashMap::new(),
            graph: None,
            exact_rows,
        }
    }

    /// How many rows are held.
    pub fn rows(&self) -> usize {
        self.keys.len()
    }

    /// Adds a row of length 1 (unit vector); `false` if it has another number of components than the rows that are there.
    pub fn add(&mut self, key: u64, row: &[f16]) -> bool {
        if self.keys.is_empty() {
            self.dims = row.len();
            self.graph = None;
        }
        if row.len() != self.dims || self.dims == 0 {
            return false;
        }
        self.remove(key);
        self.places.insert(key, self.keys.len());
        self.keys.push(key);
        self.rows.extend_from_slice(row);
        self.follow_in_graph(key);
        true
    }

    /// Removes a row if it is there.
    pub fn remove(&mut self, key: u64) {
        let Some(place) = self.places.remove(&key) else {
            return;
        };
        let last = self.keys.len() - 1;
        self.keys.swap_remove(place);
        let (at, from) = (place * self.dims, last * self.dims);
        self.rows.copy_within(from..from + self.dims, at);
        self.rows.truncate(from);
        if let Some(moved) = self.keys.get(place) {
            self.places.insert(*moved, place);
        }
        if let Some(graph) = &self.graph
            && let Err(error) = graph.remove(key)
        {
            self.give_up_graph(&error.to_string());
        }
    }

    /// The nearest rows as (key, cosine), best first; only keys for which `permitted` holds, of which there are
    /// `permitted_rows`. Empty if the query has another number of components.
    pub fn search(
        &self,
        query: &[f32],
        limit: usize,
        permitted_rows: usize,
        permitted: impl Fn(u64) -> bool,
    ) -> Vec<(u64, f32)> {
        if query.len() != self.dims || self.dims == 0 || limit == 0 {
            return Vec::new();
        }
        if permitted_rows > self.exact_rows
            && let Some(graph) = &self.graph
        {
            match graph.filtered_search(query, limit, &permitted) {
                Ok(found) => {
                    return found
                        .keys
                        .into_iter()
                        .zip(found.distances.into_iter().map(|d| 1.0 - d))
                        .collect();
                }
                Err(error) => tracing::warn!(%error, "vector graph failed; comparing every row"),
            }
        }
        self.scan(query, limit, permitted)
    }

    fn scan(
        &self,
        query: &[f32],
        limit: usize,
        permitted: impl Fn(u64) -> bool,
    ) -> Vec<(u64, f32)> {
        let mut row = vec![0.0f32; self.dims];
        let mut found: Vec<(u64, f32)> = Vec::new();
        for (place, &key) in self.keys.iter().enumerate() {
            if permitted(key) {
                self.rows[place * self.dims..(place + 1) * self.dims]
                    .convert_to_f32_slice(&mut row);
                found.push((key, query.iter().zip(&row).map(|(q, r)| q * r).sum()));
            }
        }
        found.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        found.truncate(limit);
        found
    }

    /// Keeps the graph in step with a row just added; begins one when the rows have become many.
    fn follow_in_graph(&mut self, key: u64) {
        let missing = match &self.graph {
            Some(_) => vec![key],
            None if self.keys.len() > self.exact_rows => self.keys.clone(),
            None => return,
        };
        if let Err(error) = self.add_to_graph(&missing) {
            self.give_up_graph(&error);
        }
    }

    fn add_to_graph(&mut self, keys: &[u64]) -> Result<(), String> {
        if self.graph.is_none() {
            let options = IndexOptions {
                dimensions: self.dims,
                metric: MetricKind::IP,
                quantization: ScalarKind::F16,
                expansion_search: 128,
                ..IndexOptions::default()
            };
            self.graph = Some(usearch::Index::new(&options).map_err(|e| e.to_string())?);
        }
        let Some(graph) = &self.graph else {
            return Ok(());
        };
        if graph.capacity() < self.keys.len() {
            graph
                .reserve_capacity_and_threads(self.keys.len() * 5 / 4 + 64, GRAPH_THREADS)
                .map_err(|e| e.to_string())?;
        }
        let mut row = vec![0.0f32; self.dims];
        for key in keys {
            let Some(place) = self.places.get(key) else {
                continue;
            };
            self.rows[place * self.dims..(place + 1) * self.dims].convert_to_f32_slice(&mut row);
            graph.add(*key, &row).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Without a graph every row is compared: slower, never wrong.
    fn give_up_graph(&mut self, why: &str) {
        tracing::warn!(
            why,
            rows = self.keys.len(),
            "vector graph given up; every row is compared until the next start"
        );
        self.graph = None;
        self.exact_rows = usize::MAX;
    }
}
