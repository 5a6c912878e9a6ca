//! Which blocks of the KV cache hold what, and for whom. Pure bookkeeping: the leader decides, every rank holds its own
//! heads of the same block under the same number.
//!
//! Belongs here: handing blocks out ([`Blocks`]), finding computed ones again ([`prefix`]), one sequence's blocks in order
//! ([`BlockTable`]). Which sequence gets blocks, and who must give his back, is `scheduler`.
//!
//! # Why no tenant learns what another asked, nor loses his cache to him
//!
//! A block has one owner, a tenant, from the moment it leaves the free list until it returns. Each owner has an index of
//! his own from contents to blocks, so a look-up cannot meet another's block, whatever either of them asks. Inside an
//! index the key is a chain of SHA-256 over the owner's number and all tokens up to the block's end: a hit means the same
//! tokens from the first on, and nobody can construct two prompts that share a key.
//!
//! What is evicted depends on how many blocks each owner has and when he used them, never on what is in them. So whatever
//! a second tenant asks, and however he times it, his answers run the same course whether or not the first has some
//! prompt in his cache: there is nothing to measure. What he can infer is how *busy* the cache is, as on any shared machine.
//!
//! Half of the cache is shared out by weight among the owners who have anything in it; the other half goes by use.
//! Evicted is the block that was unused for longest, but none of an owner who has no more than his part of that first half,
//! those of his running sequences counted, unless it was unused for [`PROTECTED_MS`]. So however much the others ask, a
//! tenant keeps at least his part of what he used lately: they push out their own, and what he has beyond it. Only where
//! running sequences hold so much that nobody is beyond his part, the one with most for his weight gives; who runs is the
//! scheduler's to share out. (If all of the cache were shared out, a large town would lose one hit in fifteen to what small
//! ones hold and do not use; as it is, `tests/mix.rs` finds less than one in twenty lost against one cache for all.)

mod blocks;
pub mod prefix;
mod table;

use serde::{Deserialize, Serialize};

pub use blocks::{Blocks, Owner};
/// Positions in one block, and how it keeps them; fixed by the kernels.
pub use kernels::{BLOCK_TOKENS, KvFormat};
pub use table::BlockTable;

/// How long after its last use a block within its owner's part is kept for him. After that nobody's conversation waits for
/// it, and who comes in the evening need not share the cache with all who asked during the day.
pub const PROTECTED_MS: u64 = 10 * 60 * 1000;

/// Number of a block in the cache of every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockId(pub u32);

/// A request for more blocks than there are to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "KV cache: {needed} blocks needed, {free} free; wait for a sequence to finish or preempt one"
)]
pub struct OutOfBlocks {
    pub needed: usize,
    pub free: usize,
}

#[cfg(test)]
mod tests;
