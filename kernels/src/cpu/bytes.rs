//! Zeroed memory on cache-line boundaries, in huge pages where it is large: weights are streamed through.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::device::Error;

/// A cache line: the alignment of small allocations, and what a [`Bytes`]' length is rounded up to.
pub(crate) const LINE: usize = 64;

const HUGE_PAGE: usize = 2 << 20;

/// An owned, aligned, zeroed run of bytes.
pub(crate) struct Bytes {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owns its memory, as a Vec<u8> does.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Bytes, Error> {
        let error = || Error::Memory { bytes: len, what };
        let align = if len >= 2 * HUGE_PAGE {
            HUGE_PAGE
        } else {
            LINE
        };
        let layout = Layout::from_size_align(len.max(1), align).map_err(|_| error())?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(error)?;
        #[cfg(target_os = "linux")]
        if align == HUGE_PAGE {
            // SAFETY: our own pages; the advice changes no content, and its refusal no result.
            unsafe {
                libc::madvise(
                    start.as_ptr().cast(),
                    len / HUGE_PAGE * HUGE_PAGE,
                    libc::MADV_HUGEPAGE,
                )
            };
        }
        Ok(Bytes { start, layout })
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with this size and initialised.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl std::ops::DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
