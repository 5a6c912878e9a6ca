//! Zeroed memory on cache-line boundaries, straight from the system where it is large: its pages are zero already, and come
//! only as they are touched.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::Error;

/// A cache line: the alignment of small allocations, and what a panel's length is rounded up to.
pub(crate) const LINE: usize = 64;

const HUGE_PAGE: usize = 2 << 20;
/// From this size on memory is mapped.
const MAPPED: usize = 2 * HUGE_PAGE;
/// What an [`Arena`] maps at once; only what is used of it takes memory.
const REGION: usize = 256 << 20;

/// How large memory is used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// All of it, streamed through: huge pages, so that few translations are needed.
    Huge,
    /// Here and there, a little at a time: ordinary pages, so that no more is taken than is touched.
    Sparse,
}

/// An owned, aligned, zeroed run of bytes.
pub(crate) struct Bytes {
    start: NonNull<u8>,
    len: usize,
    owned: Owned,
}

enum Owned {
    Allocated(Layout),
    Mapped(#[expect(dead_code, reason = "unmaps when dropped")] Map),
    Shared(#[expect(dead_code, reason = "unmaps when dropped by its last user")] Arc<Map>),
}

/// Puts pieces side by side into huge pages, matrices that each step reads all of: alone, the last part of each would lie in ordinary
/// pages.
#[derive(Default)]
pub(crate) struct Arena(Mutex<Option<Region>>);

struct Region {
    map: Arc<Map>,
    next: *mut u8,
    left: usize,
}

// SAFETY: owns the part of the map behind `next`, as a Vec<u8> does its memory.
unsafe impl Send for Region {}

/// A mapping of the system's; unmapped when dropped.
struct Map {
    base: *mut libc::c_void,
    len: usize,
}

// SAFETY: unmapped once, by whoever drops it last; nothing else is done with it.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

// SAFETY: owns its memory, as a Vec<u8> does.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    /// `len` zero bytes.
    pub fn zeroed(len: usize, what: &'static str, pages: Pages) -> Result<Bytes, Error> {
        let error = || Error::Memory { bytes: len, what };
        if len >= MAPPED {
            let (map, start) = Map::new(len, pages).ok_or_else(error)?;
            return Ok(Bytes {
                start,
                len,
                owned: Owned::Mapped(map),
            });
        }
        let layout = Layout::from_size_align(len.max(1), LINE).map_err(|_| error())?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(error)?;
        Ok(Bytes {
            start,
            len,
            owned: Owned::Allocated(layout),
        })
    }
}

/// Tells the system what pages to give; a refusal changes no result.
fn advise(start: *mut u8, len: usize, pages: Pages) {
    #[cfg(target_os = "linux")]
    {
        let advice = match pages {
            Pages::Huge => libc::MADV_HUGEPAGE,
            Pages::Sparse => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: our own pages, whole ones from a page's beginning; the advice changes no content.
        unsafe { libc::madvise(start.cast(), len, advice) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, len, pages);
}

impl Arena {
    /// `len` zero bytes that are streamed through. Their memory goes back when everything near them is dropped.
    pub fn zeroed(&self, len: usize, what: &'static str) -> Result<Bytes, Error> {
        if len >= REGION {
            return Bytes::zeroed(len, what, Pages::Huge);
        }
        let mut region = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = len.next_multiple_of(LINE);
        if region.as_ref().is_none_or(|r| r.left < taken) {
            let (map, start) =
                Map::new(REGION, Pages::Huge).ok_or(Error::Memory { bytes: len, what })?;
            *region = Some(Region {
                map: Arc::new(map),
                next: start.as_ptr(),
                left: REGION,
            });
        }
        let Some(Region { map, next, left }) = region.as_mut() else {
            return Bytes::zeroed(len, what, Pages::Huge);
        };
        let start = NonNull::new(*next).ok_or(Error::Memory { bytes: len, what })?;
        // SAFETY: `taken` bytes are left behind `next`; nobody else gets them.
        *next = unsafe { next.add(taken) };
        *left -= taken;
        Ok(Bytes {
            start,
            len,
            owned: Owned::Shared(map.clone()),
        })
    }
}

impl Map {
    /// `len` bytes from a huge page's beginning on, and where they begin.
    fn new(len: usize, pages: Pages) -> Option<(Map, NonNull<u8>)> {
        let map = Map::unaligned(len.checked_add(HUGE_PAGE)?)?;
        let base = map.base.cast::<u8>();
        // SAFETY: within the map, which is a huge page longer than `len`.
        let start = NonNull::new(unsafe { base.add(base.align_offset(HUGE_PAGE)) })?;
        advise(start.as_ptr(), len, pages);
        Some((map, start))
    }

    fn unaligned(len: usize) -> Option<Map> {
        // SAFETY: a new private mapping; nothing else is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        (base != libc::MAP_FAILED).then_some(Map { base, len })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, and nobody uses it any more.
        unsafe { libc::munmap(self.base, self.len) };
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes of our own, initialised.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // A map's own drop unmaps it.
        if let Owned::Allocated(layout) = self.owned {
            // SAFETY: allocated with this layout.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_memory_is_zero_aligned_and_writable_to_its_end() {
        for len in [0, 1, LINE, MAPPED - 1, MAPPED, MAPPED + 12_345] {
            for pages in [Pages::Huge, Pages::Sparse] {
                let mut bytes = Bytes::zeroed(len, "a test", pages).unwrap();
                let align = if len >= MAPPED { HUGE_PAGE } else { LINE };
                assert!(bytes.len() == len && bytes.as_ptr().align_offset(align) == 0);
                assert!(bytes.iter().all(|&b| b == 0));
                bytes.fill(7);
                assert!(bytes.iter().all(|&b| b == 7));
            }
        }
    }

    #[test]
    fn pieces_of_an_arena_are_zero_apart_and_outlive_it() {
        let arena = Arena::default();
        let sizes = [1, 100, LINE, 1 << 20, MAPPED - 1, MAPPED, 0];
        let mut piece = |i: usize| {
            if i == 40 {
                // So that the rest comes from another region; takes no memory.
                drop(arena.zeroed(REGION - MAPPED, "a test"));
            }
            arena.zeroed(sizes[i % sizes.len()], "a test").unwrap()
        };
        let mut pieces: Vec<Bytes> = (0..70).map(&mut piece).collect();
        drop(arena);
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.len(), sizes[i % sizes.len()]);
            assert!(piece.as_ptr().align_offset(LINE) == 0 && piece.iter().all(|&b| b == 0));
            piece.fill(i as u8 + 1);
        }
        pieces.drain(..10);
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.iter().all(|&b| b == i as u8 + 11));
        }
    }

    #[test]
    fn more_than_any_machine_has_is_an_error() {
        for len in [usize::MAX, usize::MAX / 2, 1 << 52] {
            assert!(matches!(
                Bytes::zeroed(len, "a test", Pages::Sparse),
                Err(Error::Memory { .. })
            ));
        }
    }
}
