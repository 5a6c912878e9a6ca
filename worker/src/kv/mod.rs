//! Which blocks of the KV cache belong to which sequence. Pure bookkeeping: the leader decides, every rank holds its own
//! heads of the same block under the same number.

use serde::{Deserialize, Serialize};

/// Positions in one block; fixed by the kernels.
pub use kernels::BLOCK_TOKENS;

/// Number of a block in the cache of every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockId(pub u32);

/// Hands out blocks; lowest free number last returned first, so that a run is deterministic.
#[derive(Debug, Clone)]
pub struct BlockAllocator {
    free: Vec<BlockId>,
    in_use: Vec<bool>,
}

/// A request for more blocks than are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "KV cache: {needed} blocks needed, {free} free; wait for a sequence to finish or preempt one"
)]
pub struct OutOfBlocks {
    pub needed: usize,
    pub free: usize,
}

impl BlockAllocator {
    /// All `blocks` are free.
    pub fn new(blocks: usize) -> Self {
        let last = u32::try_from(blocks).unwrap_or(u32::MAX);
        BlockAllocator {
            free: (0..last).rev().map(BlockId).collect(),
            in_use: vec![false; last as usize],
        }
    }

    /// Blocks that can still be handed out.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Blocks in all.
    pub fn total_blocks(&self) -> usize {
        self.in_use.len()
    }

    /// Takes one block; `None` when all are in use.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.in_use[block.0 as usize] = true;
        Some(block)
    }

    /// Gives a block back. Returns whether it was in use; giving back twice changes nothing.
    pub fn give_back(&mut self, block: BlockId) -> bool {
        match self.in_use.get_mut(block.0 as usize) {
            Some(used) if *used => {
                *used = false;
                self.free.push(block);
                true
            }
            _ => false,
        }
    }
}

/// The blocks of one sequence, in the order of its positions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// Blocks that `positions` positions need.
    pub fn blocks_for(positions: usize) -> usize {
        positions.div_ceil(BLOCK_TOKENS)
    }

    /// Grows the table until it holds `positions` positions; takes nothing if there are not enough blocks.
    pub fn reserve(
        &mut self,
        positions: usize,
        allocator: &mut BlockAllocator,
    ) -> Result<(), OutOfBlocks> {
        let needed = Self::blocks_for(positions).saturating_sub(self.blocks.len());
        if needed > allocator.free_blocks() {
            return Err(OutOfBlocks {
                needed,
                free: allocator.free_blocks(),
            });
        }
        self.blocks
            .extend((0..needed).map_while(|_| allocator.take()));
        Ok(())
    }

    /// Gives back the blocks beyond those that `positions` positions need.
    pub fn shrink(&mut self, positions: usize, allocator: &mut BlockAllocator) {
        let kept = Self::blocks_for(positions).min(self.blocks.len());
        for block in self.blocks.drain(kept..) {
            allocator.give_back(block);
        }
    }

    /// Gives all blocks back.
    pub fn release(&mut self, allocator: &mut BlockAllocator) {
        for block in self.blocks.drain(..) {
            allocator.give_back(block);
        }
    }

    /// Where a position's keys and values lie; `None` beyond what was reserved.
    pub fn slot(&self, position: usize) -> Option<u32> {
        let block = self.blocks.get(position / BLOCK_TOKENS)?;
        Some(block.0 * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32)
    }

    /// The blocks' numbers, as a [`crate::model::Span`] carries them.
    pub fn ids(&self) -> Vec<u32> {
        self.blocks.iter().map(|b| b.0).collect()
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether no block is held.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_are_never_shared_nor_lost(total in 0usize..40, wishes in proptest::collection::vec((0usize..6, 0usize..200, any::<bool>()), 0..60)) {
            let mut allocator = BlockAllocator::new(total);
            let mut tables = vec![BlockTable::default(); 6];
            for (which, positions, release) in wishes {
                if release {
                    tables[which].release(&mut allocator);
                } else {
                    let before = tables[which].len();
                    match tables[which].reserve(positions, &mut allocator) {
                        Ok(()) => prop_assert!(tables[which].len() >= BlockTable::blocks_for(positions)),
                        Err(e) => {
                            prop_assert_eq!(tables[which].len(), before);
                            prop_assert!(e.needed > e.free);
                        }
                    }
                }
                let mut held: Vec<u32> = tables.iter().flat_map(BlockTable::ids).collect();
                prop_assert_eq!(held.len() + allocator.free_blocks(), total);
                held.sort_unstable();
                held.dedup();
                prop_assert_eq!(held.len() + allocator.free_blocks(), total);
            }
        }
    }

    #[test]
    fn a_position_finds_its_slot_in_its_own_block() {
        let mut allocator = BlockAllocator::new(4);
        let mut other = BlockTable::default();
        let mut table = BlockTable::default();
        table.reserve(BLOCK_TOKENS, &mut allocator).unwrap();
        other.reserve(1, &mut allocator).unwrap();
        table.reserve(BLOCK_TOKENS + 1, &mut allocator).unwrap();
        assert_eq!(table.ids(), [0, 2]);
        assert_eq!(table.slot(BLOCK_TOKENS), Some(2 * BLOCK_TOKENS as u32));
        assert_eq!(table.slot(2 * BLOCK_TOKENS), None);
    }

    #[test]
    fn giving_a_block_back_twice_frees_it_once() {
        let mut allocator = BlockAllocator::new(1);
        let block = allocator.take().unwrap();
        assert!(allocator.give_back(block));
        assert!(!allocator.give_back(block));
        assert_eq!(allocator.free_blocks(), 1);
    }
}
