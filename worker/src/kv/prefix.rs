//! Names for the contents of blocks.

use sha2::{Digest, Sha256};

use super::{BLOCK_TOKENS, Owner};

/// Stands for an owner and all tokens from a sequence's first to the end of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The key before an owner's first block. The number keeps equal prompts of two owners apart once more than their
    /// separate indexes do; the generation, those before and after something was forgotten.
    pub fn root(owner: Owner) -> Self {
        let mut hash = Sha256::new_with_prefix(b"verbund kv prefix 2");
        hash.update(owner.number().to_le_bytes());
        hash.update(owner.generation().to_le_bytes());
        Self(hash.finalize().into())
    }

    /// The key of the block that follows, with its tokens.
    pub fn then(&self, tokens: &[u32; BLOCK_TOKENS]) -> Self {
        let mut bytes = [0; 4 * BLOCK_TOKENS];
        for (four, token) in bytes.chunks_exact_mut(4).zip(tokens) {
            four.copy_from_slice(&token.to_le_bytes());
        }
        let mut hash = Sha256::new_with_prefix(self.0);
        hash.update(bytes);
        Self(hash.finalize().into())
    }
}
