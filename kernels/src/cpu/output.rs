//! Where the products of a matrix go.

use super::layout::Matrix;
use super::simd::Simd;

/// Of which kind, `[rows, w.rows]`.
#[derive(Clone, Copy)]
pub(crate) enum Output {
    /// Of a matrix whose columns are one part.
    Floats(*mut f32),
    /// Of several parts: each rounded [`to_grid`](crate::device::to_grid), and added up in order.
    Grid(*mut f64),
}

impl Output {
    /// Takes what a part gave for one panel and one row. It is added to `total`, which begins with zero and is
    /// [written](Output::finish) at the end: rows of the output lie far apart, often where a cache has room for few of them. The only
    /// part of floats is written at once.
    ///
    /// # Safety
    /// As [`Simd`]; the output is valid for this panel of this row.
    #[inline(always)]
    pub unsafe fn take<S: Simd>(
        self,
        w: &Matrix,
        panel: usize,
        row: usize,
        sum: S::F,
        total: &mut S::Grid,
    ) {
        // SAFETY: by the contract; a whole vector is written only where so many rows of the matrix follow.
        unsafe {
            match self {
                Output::Floats(out) => {
                    let Some(lanes) = Lanes::of::<S>(w, panel, row) else {
                        return;
                    };
                    let out = out.add(lanes.at);
                    if lanes.count == S::LANES {
                        S::store(out, sum);
                    } else {
                        let mut all = Aligned([0.0; 16]);
                        S::store(all.0.as_mut_ptr(), sum);
                        std::ptr::copy_nonoverlapping(all.0.as_ptr(), out, lanes.count);
                    }
                }
                Output::Grid(_) => *total = S::add_grid(*total, sum),
            }
        }
    }

    /// Writes the total of all parts.
    ///
    /// # Safety
    /// As of [`take`](Output::take).
    #[inline(always)]
    pub unsafe fn finish<S: Simd>(self, w: &Matrix, panel: usize, row: usize, total: S::Grid) {
        let Output::Grid(out) = self else { return };
        let Some(lanes) = Lanes::of::<S>(w, panel, row) else {
            return;
        };
        // SAFETY: by the contract; a whole vector is written only where so many rows of the matrix follow.
        unsafe {
            let out = out.add(lanes.at);
            if lanes.count == S::LANES {
                S::store_grid(out, total);
            } else {
                let mut all = Aligned([0.0; 16]);
                S::store_grid(all.0.as_mut_ptr(), total);
                std::ptr::copy_nonoverlapping(all.0.as_ptr(), out, lanes.count);
            }
        }
    }
}

/// An aligned local makes the compiler align a kernel's whole frame, and with it the vectors that found no register: where they lie across
/// cache lines, two rows cost up to a tenth more.
#[repr(align(64))]
struct Aligned<T>([T; 16]);

/// The lanes of a panel that are rows of the matrix.
struct Lanes {
    /// The first one's place in the output.
    at: usize,
    count: usize,
}

impl Lanes {
    /// None where the last strip has panels without rows.
    #[inline(always)]
    fn of<S: Simd>(w: &Matrix, panel: usize, row: usize) -> Option<Lanes> {
        let first = panel * S::LANES;
        (first < w.rows).then(|| Lanes {
            at: row * w.rows + first,
            count: S::LANES.min(w.rows - first),
        })
    }
}
