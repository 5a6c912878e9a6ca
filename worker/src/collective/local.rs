//! A group of one.

use super::{Collective, Error, Interrupter};

/// The collective of a rank that is alone: every sum is its own.
#[derive(Default)]
pub struct Local {
    interrupter: Interrupter,
}

impl Local {
    /// A group of one whose calls `interrupter` ends.
    pub fn with(interrupter: Interrupter) -> Self {
        Self { interrupter }
    }
}

impl Collective for Local {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce_f64(&mut self, _data: &mut [f64]) -> Result<(), Error> {
        self.interrupter.check()
    }

    fn all_reduce_exact(&mut self, _data: &mut [f64]) -> Result<(), Error> {
        self.interrupter.check()
    }

    fn gather_to_leader(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        Ok(vec![mine.to_vec()])
    }

    fn broadcast(&mut self, _message: &mut Vec<u8>) -> Result<(), Error> {
        self.interrupter.check()
    }

    fn interrupter(&self) -> Interrupter {
        self.interrupter.clone()
    }
}
