//! From glyphs in drawing order to lines of text with their places.

use pdf_extract::{MediaBox, OutputDev, OutputError, Transform};

/// A gap wider than this many font sizes parts words.
const WORD_GAP: f64 = 0.12;
/// A gap wider than this many font sizes parts cells of a table row.
const CELL_GAP: f64 = 2.5;
/// What may stand left of a tab without being a cell: "(10)", "12.", "a)".
const MAX_SIGN_CHARS: usize = 4;

/// A line of text. Lengths in points; y grows upwards.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub text: String,
    pub x: f64,
    pub end: f64,
    pub y: f64,
    pub size: f64,
    /// Whether wide gaps part it like a table row.
    pub cells: bool,
}

/// Collects the glyphs of one page.
#[derive(Default)]
pub(super) struct Glyphs {
    lines: Vec<Line>,
}

impl Glyphs {
    pub fn into_lines(self) -> Vec<Line> {
        self.lines
            .into_iter()
            .filter(|l| !l.text.trim().is_empty())
            .collect()
    }

    fn put(&mut self, x: f64, y: f64, width: f64, size: f64, glyph: &str) {
        if ![x, y, width, size].iter().all(|n| n.is_finite()) {
            return;
        }
        if let Some(line) = self.lines.last_mut() {
            let same_height = (y - line.y).abs() <= 0.5 * size.max(line.size);
            let goes_on = x >= line.end - 2.0 * size.max(line.size);
            if same_height && goes_on {
                let gap = (x - line.end) / size.max(1.0);
                let blank =
                    glyph.trim().is_empty() || line.text.ends_with(' ') || line.text.is_empty();
                if gap > CELL_GAP
                    && line.text.trim().chars().count() > MAX_SIGN_CHARS
                    && !glyph.trim().is_empty()
                {
                    line.text.truncate(line.text.trim_end().len());
                    line.text.push_str(" | ");
                    line.cells = true;
                } else if gap > WORD_GAP && !blank {
                    line.text.push(' ');
                }
                line.text.push_str(glyph);
                // Blanks have a width, but only ink says where a cell ends.
                if !glyph.trim().is_empty() {
                    line.end = line.end.max(x + width);
                    line.size = line.size.max(size);
                }
                return;
            }
        }
        if !glyph.trim().is_empty() {
            self.lines.push(Line {
                text: glyph.to_string(),
                x,
                end: x + width,
                y,
                size,
                cells: false,
            });
        }
    }
}

impl OutputDev for Glyphs {
    fn begin_page(
        &mut self,
        _: u32,
        _: &MediaBox,
        _: Option<(f64, f64, f64, f64)>,
    ) -> Result<(), OutputError> {
        Ok(())
    }

    fn end_page(&mut self) -> Result<(), OutputError> {
        Ok(())
    }

    fn output_character(
        &mut self,
        trm: &Transform,
        width: f64,
        _spacing: f64,
        font_size: f64,
        glyph: &str,
    ) -> Result<(), OutputError> {
        let size = font_size.abs() * trm.m21.hypot(trm.m22);
        let advance = width * font_size.abs() * trm.m11.hypot(trm.m12);
        // Text that runs upwards is read as if the page were turned.
        let turned = trm.m12.abs() > trm.m11.abs();
        let (x, y) = if turned {
            (trm.m32, -trm.m31)
        } else {
            (trm.m31, trm.m32)
        };
        self.put(x, y, advance, size, glyph);
        Ok(())
    }

    fn begin_word(&mut self) -> Result<(), OutputError> {
        Ok(())
    }

    fn end_word(&mut self) -> Result<(), OutputError> {
        Ok(())
    }

    fn end_line(&mut self) -> Result<(), OutputError> {
        Ok(())
    }
}
