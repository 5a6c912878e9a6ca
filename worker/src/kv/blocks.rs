//! All blocks of the cache: who holds them, what is in them, and which is taken next.

use std::collections::{BTreeSet, HashMap};

use super::prefix::Key;
use super::{BlockId, PROTECTED_MS};

/// Whose blocks: the number of a tenant in this cache, and how often what he had was forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    number: u32,
    generation: u32,
}

impl Owner {
    /// Small, counted from zero.
    pub fn number(self) -> u32 {
        self.number
    }

    /// Counted from zero.
    pub fn generation(self) -> u32 {
        self.generation
    }
}

/// When a block was let go: time, then order.
type Stamp = (u64, u64);

#[derive(Debug, Clone, Default)]
struct Block {
    owner: u32,
    /// Sequences that have it in their tables.
    holders: u32,
    /// What is in it, once it is full and computed.
    key: Option<Key>,
    /// When its last holder let it go.
    left: Stamp,
}

#[derive(Debug, Clone)]
struct OwnerState {
    weight: u32,
    generation: u32,
    /// Blocks that are not free, held or not.
    blocks: usize,
    index: HashMap<Key, BlockId>,
    /// Blocks without a holder that can be found again, longest unused first.
    idle: BTreeSet<(Stamp, BlockId)>,
}

impl OwnerState {
    /// Weight that counts when the cache is shared out.
    fn present_weight(&self) -> u64 {
        if self.blocks > 0 {
            u64::from(self.weight)
        } else {
            0
        }
    }

    /// His idle block that was unused for longest.
    fn oldest(&self, number: u32) -> Option<(Stamp, u32)> {
        self.idle.first().map(|&(stamp, _)| (stamp, number))
    }
}

/// The cache. A block is free, or held by sequences of one owner, or idle: without holder but still in its owner's index.
#[derive(Debug, Clone)]
pub struct Blocks {
    free: Vec<BlockId>,
    all: Vec<Block>,
    owners: Vec<OwnerState>,
    /// Owners that have idle blocks, by the one of them that was unused for longest.
    oldest: BTreeSet<(Stamp, u32)>,
    idle: usize,
    /// Of the owners that have any block.
    present_weight: u64,
    now_ms: u64,
    order: u64,
    evictions: u64,
}

impl Blocks {
    /// All `blocks` are free, and the lowest number is handed out first.
    pub fn new(blocks: usize) -> Self {
        let last = u32::try_from(blocks).unwrap_or(u32::MAX);
        Self {
            free: (0..last).rev().map(BlockId).collect(),
            all: vec![Block::default(); last as usize],
            owners: Vec::new(),
            oldest: BTreeSet::new(),
            idle: 0,
            present_weight: 0,
            now_ms: 0,
            order: 0,
            evictions: 0,
        }
    }

    /// A new owner with a share of `weight`, at least 1.
    pub fn add_owner(&mut self, weight: u32) -> Owner {
        let owner = Owner {
            number: self.owners.len() as u32,
            generation: 0,
        };
        self.owners.push(OwnerState {
            weight: weight.max(1),
            generation: owner.generation,
            blocks: 0,
            index: HashMap::new(),
            idle: BTreeSet::new(),
        });
        owner
    }

    pub fn set_weight(&mut self, owner: Owner, weight: u32) {
        self.change(owner.number, |state| state.weight = weight.max(1));
    }

    /// Nothing of what the owner has so far is found again: what nobody holds is free at once, the rest when it is let go.
    /// Returns the owner as he goes on; tables of the former one keep their blocks and make nothing known.
    pub fn forget(&mut self, owner: Owner) -> Owner {
        let index = std::mem::take(&mut self.owners[owner.number as usize].index);
        for id in index.into_values() {
            self.all[id.0 as usize].key = None;
        }
        let mut freed = BTreeSet::new();
        self.change(owner.number, |state| {
            state.generation += 1;
            freed = std::mem::take(&mut state.idle);
            state.blocks -= freed.len();
        });
        for (_, id) in freed {
            self.all[id.0 as usize] = Block::default();
            self.free.push(id);
        }
        Owner {
            generation: self.owners[owner.number as usize].generation,
            ..owner
        }
    }

    /// Whether nothing was forgotten since the owner came by this.
    pub fn is_current(&self, owner: Owner) -> bool {
        self.owners[owner.number as usize].generation == owner.generation
    }

    /// The time from here on; it does not run backwards.
    pub fn advance(&mut self, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
    }

    /// Blocks that [`Self::take`] can still give: free and idle ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.all.len()
    }

    /// Blocks without a holder that can be found again.
    pub fn idle(&self) -> usize {
        self.idle
    }

    /// Blocks of an owner, held and idle.
    pub fn owned(&self, owner: Owner) -> usize {
        self.owners[owner.number as usize].blocks
    }

    /// Idle blocks that were taken for something else.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Gives `owner` a block with nothing in it, held once; `None` when all are held.
    pub fn take(&mut self, owner: Owner) -> Option<BlockId> {
        if self.free.is_empty() {
            self.evict();
        }
        let id = self.free.pop()?;
        self.all[id.0 as usize] = Block {
            owner: owner.number,
            holders: 1,
            ..Block::default()
        };
        self.change(owner.number, |state| state.blocks += 1);
        Some(id)
    }

    /// Whether `owner` has a block with these contents: `Some(true)` if it is idle.
    pub fn find(&self, owner: Owner, key: &Key) -> Option<bool> {
        let id = self.owners[owner.number as usize].index.get(key)?;
        Some(self.all[id.0 as usize].holders == 0)
    }

    /// Holds the owner's block with these contents, if there is one. Nothing may be written into it.
    pub fn hold(&mut self, owner: Owner, key: &Key) -> Option<BlockId> {
        let id = *self.owners[owner.number as usize].index.get(key)?;
        let block = &mut self.all[id.0 as usize];
        block.holders += 1;
        if block.holders == 1 {
            let entry = (block.left, id);
            self.change(owner.number, |state| {
                state.idle.remove(&entry);
            });
        }
        Some(id)
    }

    /// Records what a held block contains from now on. `false`, and nothing happens, if the owner has another block with
    /// the same contents, or the block's are known already.
    pub fn publish(&mut self, id: BlockId, key: Key) -> bool {
        let block = &mut self.all[id.0 as usize];
        debug_assert!(block.holders > 0, "published by somebody who holds it");
        let index = &mut self.owners[block.owner as usize].index;
        if block.key.is_some() || index.contains_key(&key) {
            return false;
        }
        index.insert(key, id);
        block.key = Some(key);
        true
    }

    /// Lets go of a block. Without a holder it becomes idle if its contents are known, else free. Returns whether it was
    /// held; letting go of what nobody holds changes nothing.
    pub fn release(&mut self, id: BlockId) -> bool {
        let Some(block) = self.all.get_mut(id.0 as usize).filter(|b| b.holders > 0) else {
            return false;
        };
        block.holders -= 1;
        if block.holders > 0 {
            return true;
        }
        let owner = block.owner;
        if block.key.is_some() {
            self.order += 1;
            block.left = (self.now_ms, self.order);
            let entry = (block.left, id);
            self.change(owner, |state| {
                state.idle.insert(entry);
            });
        } else {
            self.free.push(id);
            self.change(owner, |state| state.blocks -= 1);
        }
        true
    }

    /// Frees one idle block, if there is one.
    fn evict(&mut self) {
        // Owners within their part are passed over; there are at most as many as municipalities.
        let beyond = self.oldest.iter().find(|&&((since_ms, _), owner)| {
            self.now_ms.saturating_sub(since_ms) > PROTECTED_MS || self.is_beyond_part(owner)
        });
        let owner = match beyond {
            Some(&(_, owner)) => Some(owner),
            None => self.most_for_weight(),
        };
        let entry = owner.and_then(|owner| self.owners[owner as usize].idle.first().copied());
        let Some(entry) = entry else {
            return;
        };
        let id = entry.1;
        let block = std::mem::take(&mut self.all[id.0 as usize]);
        self.change(block.owner, |state| {
            state.idle.remove(&entry);
            state.blocks -= 1;
            if let Some(key) = &block.key {
                state.index.remove(key);
            }
        });
        self.free.push(id);
        self.evictions += 1;
    }

    /// Whether an owner has more than his part of the half that is shared out.
    fn is_beyond_part(&self, owner: u32) -> bool {
        let state = &self.owners[owner as usize];
        let part =
            self.all.len() as u64 * u64::from(state.weight) / (2 * self.present_weight.max(1));
        state.blocks as u64 > part
    }

    /// Of the owners with idle blocks, the one who has most for his weight.
    fn most_for_weight(&self) -> Option<u32> {
        let for_weight = |owner: u32| {
            let state = &self.owners[owner as usize];
            ((state.blocks as u64) << 16) / u64::from(state.weight)
        };
        let owners = self.oldest.iter().map(|&(_, owner)| owner);
        owners.max_by_key(|&owner| (for_weight(owner), owner))
    }

    /// Changes an owner, and keeps the counts over all.
    fn change(&mut self, owner: u32, change: impl FnOnce(&mut OwnerState)) {
        let state = &mut self.owners[owner as usize];
        if let Some(entry) = state.oldest(owner) {
            self.oldest.remove(&entry);
        }
        self.idle -= state.idle.len();
        self.present_weight -= state.present_weight();
        change(state);
        if let Some(entry) = state.oldest(owner) {
            self.oldest.insert(entry);
        }
        self.idle += state.idle.len();
        self.present_weight += state.present_weight();
    }

    /// Checks that every block is in exactly one state and every count right.
    ///
    /// # Panics
    /// One is not.
    #[cfg(test)]
    pub fn check(&self) {
        let mut free = vec![false; self.all.len()];
        for id in &self.free {
            assert!(
                !std::mem::replace(&mut free[id.0 as usize], true),
                "freed twice"
            );
        }
        let mut blocks = vec![0; self.owners.len()];
        let mut idle = 0;
        for (number, block) in self.all.iter().enumerate() {
            let id = BlockId(number as u32);
            if free[number] {
                assert_eq!((block.holders, &block.key), (0, &None));
                continue;
            }
            let owner = &self.owners[block.owner as usize];
            blocks[block.owner as usize] += 1;
            if let Some(key) = &block.key {
                assert_eq!(owner.index.get(key), Some(&id));
            }
            let entry = (block.left, id);
            let is_idle = block.holders == 0;
            assert!(
                !is_idle || block.key.is_some(),
                "neither free, held nor to be found"
            );
            assert_eq!(is_idle, owner.idle.contains(&entry));
            idle += usize::from(is_idle);
        }
        assert_eq!(idle, self.idle);
        for (number, owner) in self.owners.iter().enumerate() {
            assert_eq!(owner.blocks, blocks[number]);
            if let Some(entry) = owner.oldest(number as u32) {
                assert!(self.oldest.contains(&entry));
            }
            for id in owner.index.values() {
                assert_eq!(self.all[id.0 as usize].owner as usize, number);
                assert!(!free[id.0 as usize], "found after it was freed");
            }
        }
        let with_idle = self.owners.iter().filter(|o| !o.idle.is_empty()).count();
        assert_eq!(self.oldest.len(), with_idle);
        let weights = self.owners.iter().map(OwnerState::present_weight);
        assert_eq!(weights.sum::<u64>(), self.present_weight);
    }
}
