//! The blocks of one sequence, in the order of its positions.

use super::prefix::Key;
use super::{BLOCK_TOKENS, BlockId, Blocks, OutOfBlocks, Owner};

/// Full blocks at the front may be shared with other sequences of the same owner; a sequence writes only behind what was
/// found, which are blocks it alone holds.
#[derive(Debug, Clone)]
pub struct BlockTable {
    owner: Owner,
    blocks: Vec<BlockId>,
    /// Of the sequence's full blocks, as far as they were asked for. Tokens are only ever added, so they stay right.
    keys: Vec<Key>,
    /// Blocks whose contents were made known, or were found.
    known: usize,
}

impl BlockTable {
    /// Holds nothing yet.
    pub fn new(owner: Owner) -> Self {
        Self {
            owner,
            blocks: Vec::new(),
            keys: Vec::new(),
            known: 0,
        }
    }

    /// Blocks that `positions` positions need.
    pub fn blocks_for(positions: usize) -> usize {
        positions.div_ceil(BLOCK_TOKENS)
    }

    /// How many blocks [`Self::reuse`] would find for `tokens`, and how many of them are idle now.
    pub fn findable(&mut self, tokens: &[u32], blocks: &Blocks) -> (usize, usize) {
        let (mut found, mut idle) = (0, 0);
        while let Some(is_idle) = self
            .reusable(found, tokens)
            .and_then(|key| blocks.find(self.owner, &key))
        {
            found += 1;
            idle += usize::from(is_idle);
        }
        (found, idle)
    }

    /// Fills an empty table with the blocks that hold the beginning of `tokens` already, and returns the positions in them:
    /// fewer than there are tokens, so that something is left to compute.
    pub fn reuse(&mut self, tokens: &[u32], blocks: &mut Blocks) -> usize {
        debug_assert!(self.blocks.is_empty(), "reuse comes first");
        while let Some(id) = self
            .reusable(self.blocks.len(), tokens)
            .and_then(|key| blocks.hold(self.owner, &key))
        {
            self.blocks.push(id);
        }
        self.known = self.blocks.len();
        self.known * BLOCK_TOKENS
    }

    /// The key of the block at `index` if it is full and at least one token follows.
    fn reusable(&mut self, index: usize, tokens: &[u32]) -> Option<Key> {
        ((index + 1) * BLOCK_TOKENS < tokens.len())
            .then(|| self.key(index, tokens))
            .flatten()
    }

    fn key(&mut self, index: usize, tokens: &[u32]) -> Option<Key> {
        while self.keys.len() <= index {
            let from = self.keys.len() * BLOCK_TOKENS;
            let contents = tokens.get(from..from + BLOCK_TOKENS)?.try_into().ok()?;
            let before = self.keys.last().copied();
            let before = before.unwrap_or_else(|| Key::root(self.owner));
            self.keys.push(before.then(contents));
        }
        self.keys.get(index).copied()
    }

    /// Makes the full blocks among the first `computed` positions of `tokens` known, for others of the same owner and for
    /// this sequence's return. Nothing if what the owner had was forgotten since the table began.
    pub fn publish(&mut self, tokens: &[u32], computed: usize, blocks: &mut Blocks) {
        while blocks.is_current(self.owner) && (self.known + 1) * BLOCK_TOKENS <= computed {
            let index = self.known;
            let (Some(key), Some(&id)) = (self.key(index, tokens), self.blocks.get(index)) else {
                return;
            };
            blocks.publish(id, key);
            self.known += 1;
        }
    }

    /// Grows the table until it holds `positions` positions; takes nothing if there are not enough blocks.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when the others are held.
    pub fn reserve(&mut self, positions: usize, blocks: &mut Blocks) -> Result<(), OutOfBlocks> {
        let needed = Self::blocks_for(positions).saturating_sub(self.blocks.len());
        let free = blocks.available();
        if needed > free {
            return Err(OutOfBlocks { needed, free });
        }
        self.blocks
            .extend((0..needed).map_while(|_| blocks.take(self.owner)));
        Ok(())
    }

    /// Gives back the blocks beyond those that `positions` positions need.
    pub fn shrink(&mut self, positions: usize, blocks: &mut Blocks) {
        let kept = Self::blocks_for(positions).min(self.blocks.len());
        // The last first, so that a beginning outlives what can be found only behind it.
        for id in self.blocks.drain(kept..).rev() {
            blocks.release(id);
        }
        self.known = self.known.min(kept);
    }

    /// Gives all blocks back.
    pub fn release(&mut self, blocks: &mut Blocks) {
        self.shrink(0, blocks);
    }

    /// Where a position's keys and values lie; `None` beyond what was reserved.
    pub fn slot(&self, position: usize) -> Option<u32> {
        let block = self.blocks.get(position / BLOCK_TOKENS)?;
        Some(block.0 * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32)
    }

    /// The numbers of the blocks that `positions` positions need, as a [`crate::model::Span`] carries them.
    pub fn ids(&self, positions: usize) -> Vec<u32> {
        let held = Self::blocks_for(positions).min(self.blocks.len());
        self.blocks[..held].iter().map(|b| b.0).collect()
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
