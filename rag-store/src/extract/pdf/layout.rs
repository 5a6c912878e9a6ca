//! From lines to blocks: running heads go, wrapped lines join, sizes and section signs make headings.

use std::collections::HashMap;

use super::super::build::Builder;
use super::super::structure::{
    is_section_sign_heading, is_short_title, numbered_heading_depth, opens_item,
};
use super::super::{ExtractError, fold_line};
use super::glyphs::Line;

/// A line this much larger than the body's is a heading.
const HEADING_SIZE: f64 = 1.12;
const MAX_HEADING_WORDS: usize = 30;
/// More distance than this many usual leadings begins a paragraph.
const PARAGRAPH_GAP: f64 = 1.25;
/// A line that ends this much before the right edge (share of the width) may be a paragraph's last.
const SHORT_LINE: f64 = 0.15;
/// Lines looked at for running heads at the top and at the bottom of a page.
const RUNNING_LINES: usize = 2;
/// A running head stands on this share of the pages.
const RUNNING_SHARE: f64 = 0.6;

pub(super) struct Page {
    pub number: u32,
    pub lines: Vec<Line>,
}

pub(super) fn build(mut pages: Vec<Page>, builder: &mut Builder) -> Result<(), ExtractError> {
    for page in &mut pages {
        page.lines
            .iter_mut()
            .for_each(|l| l.text = fold_line(&l.text));
        page.lines.retain(|l| !l.text.is_empty());
    }
    drop_running_heads(&mut pages);
    let style = Style::of(&pages);
    for page in &pages {
        builder.page(page.number);
        let mut from = 0;
        while let Some(line) = page.lines.get(from) {
            let mut to = from + 1;
            while to < page.lines.len() && style.joins(&page.lines, to) {
                to += 1;
            }
            let lines = page.lines.get(from..to).unwrap_or(&[]);
            let text = join(lines);
            let apart = from == 0 || style.gap(&page.lines, from) > PARAGRAPH_GAP;
            let closed = to >= page.lines.len() || style.gap(&page.lines, to) > PARAGRAPH_GAP;
            if line.cells && style.heading_level(line, &text).is_none() {
                builder.table(
                    &lines
                        .iter()
                        .map(|l| vec![l.text.clone()])
                        .collect::<Vec<_>>(),
                )?;
            } else if let Some(level) = style.heading_level(line, &text) {
                builder.heading(level, &text)?;
            } else if let Some(depth) =
                numbered_heading_depth(&text).filter(|_| apart && closed && lines.len() == 1)
            {
                builder.heading(style.below(depth), &text)?;
            } else {
                builder.paragraph(&text)?;
            }
            from = to;
        }
    }
    Ok(())
}

/// A line that returns on most pages, page numbers aside, at the top or the bottom.
fn drop_running_heads(pages: &mut [Page]) {
    if pages.len() < 2 {
        return;
    }
    let key = |l: &Line| {
        let text: String = l
            .text
            .chars()
            .map(|c| if c.is_ascii_digit() { '#' } else { c })
            .collect();
        (text.replace("##", "#"), (l.size * 2.0) as i64)
    };
    for _ in 0..RUNNING_LINES {
        let mut seen: HashMap<_, usize> = HashMap::new();
        let edges = |page: &Page| {
            let by_height = |a: &usize, b: &usize| {
                let y = |i: &usize| page.lines.get(*i).map_or(0.0, |l| l.y);
                y(a).total_cmp(&y(b))
            };
            let all = 0..page.lines.len();
            let mut edges: Vec<usize> = all
                .clone()
                .min_by(by_height)
                .into_iter()
                .chain(all.max_by(by_height))
                .collect();
            edges.dedup();
            edges
        };
        for page in pages.iter() {
            for line in edges(page).into_iter().filter_map(|i| page.lines.get(i)) {
                *seen.entry(key(line)).or_default() += 1;
            }
        }
        let enough = ((pages.len() as f64 * RUNNING_SHARE).ceil() as usize).max(2);
        for page in pages.iter_mut() {
            let mut edges = edges(page);
            edges.sort_unstable_by(|a, b| b.cmp(a));
            for i in edges {
                if page
                    .lines
                    .get(i)
                    .is_some_and(|l| seen.get(&key(l)).is_some_and(|n| *n >= enough))
                {
                    page.lines.remove(i);
                }
            }
        }
    }
}

/// What is usual in this document.
struct Style {
    /// Points.
    body_size: f64,
    /// Distance of two lines of a paragraph, in font sizes.
    leading: f64,
    right: f64,
    width: f64,
    /// Heading sizes in half points, largest first.
    heading_sizes: Vec<i64>,
}

impl Style {
    fn of(pages: &[Page]) -> Self {
        let mut chars: HashMap<i64, usize> = HashMap::new();
        let mut leadings = Vec::new();
        let (mut left, mut right) = (f64::INFINITY, 0.0f64);
        for page in pages {
            for line in &page.lines {
                *chars.entry(half_points(line.size)).or_default() += line.text.chars().count();
                left = left.min(line.x);
                right = right.max(line.end);
            }
            for pair in page.lines.windows(2) {
                if let [a, b] = pair
                    && same_size(a, b)
                    && a.y > b.y
                {
                    leadings.push((a.y - b.y) / b.size.max(1.0));
                }
            }
        }
        let body = chars
            .iter()
            .max_by_key(|(size, n)| (**n, **size))
            .map_or(22, |(size, _)| *size);
        leadings.sort_unstable_by(f64::total_cmp);
        // The lower third: paragraphs' inner distances, also where most paragraphs are one line.
        let leading = leadings
            .get(leadings.len() / 3)
            .copied()
            .unwrap_or(1.2)
            .clamp(0.9, 2.5);
        let mut heading_sizes: Vec<i64> = chars
            .into_keys()
            .filter(|size| *size as f64 > body as f64 * HEADING_SIZE)
            .collect();
        heading_sizes.sort_unstable_by(|a, b| b.cmp(a));
        Self {
            body_size: body as f64 / 2.0,
            leading,
            right,
            width: (right - left).max(1.0),
            heading_sizes,
        }
    }

    /// Distance to the line above in usual leadings; infinite for a new column.
    fn gap(&self, lines: &[Line], at: usize) -> f64 {
        match (
            at.checked_sub(1).and_then(|above| lines.get(above)),
            lines.get(at),
        ) {
            (Some(above), Some(line)) if above.y > line.y - 0.1 => {
                (above.y - line.y) / (line.size.max(1.0) * self.leading)
            }
            _ => f64::INFINITY,
        }
    }

    /// Whether a line goes on with the paragraph, table or heading of the line above it.
    fn joins(&self, lines: &[Line], at: usize) -> bool {
        let (Some(above), Some(line)) =
            (at.checked_sub(1).and_then(|i| lines.get(i)), lines.get(at))
        else {
            return false;
        };
        if self.gap(lines, at) > PARAGRAPH_GAP || !same_size(above, line) {
            // Rows of a table stand apart, but belong together.
            return above.cells
                && line.cells
                && same_size(above, line)
                && self.gap(lines, at) < 2.5;
        }
        if above.cells != line.cells {
            return false;
        }
        if above.cells {
            return true;
        }
        if self.is_large(line) {
            return !is_section_sign_heading(&line.text)
                && numbered_heading_depth(&line.text).is_none();
        }
        if is_section_sign_heading(&above.text) {
            // "§ 5" alone: its title is the next line.
            return above.text.split_whitespace().count() <= 2
                && is_short_title(&line.text)
                && !opens_item(&line.text);
        }
        let ended = above.end < self.right - self.width * SHORT_LINE
            && above.text.ends_with(['.', '!', '?', ':', ';']);
        !(ended || opens_item(&line.text) || is_section_sign_heading(&line.text))
    }

    fn is_large(&self, line: &Line) -> bool {
        line.size > self.body_size * HEADING_SIZE
    }

    fn heading_level(&self, line: &Line, text: &str) -> Option<u8> {
        if self.is_large(line)
            && text.split_whitespace().count() <= MAX_HEADING_WORDS
            && text.chars().any(char::is_alphabetic)
        {
            let rank = self
                .heading_sizes
                .iter()
                .position(|size| *size == half_points(line.size))
                .unwrap_or(0);
            return Some(u8::try_from(rank + 1).unwrap_or(u8::MAX));
        }
        is_section_sign_heading(text).then(|| self.below(1))
    }

    /// A level under all headings that are larger than the body.
    fn below(&self, depth: u8) -> u8 {
        u8::try_from(self.heading_sizes.len())
            .unwrap_or(u8::MAX)
            .saturating_add(depth)
    }
}

fn half_points(size: f64) -> i64 {
    (size * 2.0).round() as i64
}

fn same_size(a: &Line, b: &Line) -> bool {
    (a.size - b.size).abs() <= 0.08 * a.size.max(b.size)
}

/// Joins wrapped lines; a line-end hyphen goes where it only parts a word's syllables.
fn join(lines: &[Line]) -> String {
    let mut out = String::new();
    for line in lines {
        let next = line.text.trim();
        let stays = |c: &str| {
            ["und", "oder", "bzw", "sowie"]
                .iter()
                .any(|w| c.starts_with(w))
        };
        if out.ends_with('-') && out.chars().rev().nth(1).is_some_and(char::is_alphabetic) {
            let word = out.rsplit(' ').next().unwrap_or("");
            let single = word.chars().count() == 2;
            match next.chars().next() {
                // "Hunde-|steuer": one word. "E-|mail": its hyphen is its own. "Park- und …": a word left out.
                Some(c) if c.is_lowercase() && !stays(next) && !single => {
                    out.pop();
                }
                Some(c) if c.is_lowercase() && stays(next) => out.push(' '),
                _ => {}
            }
        } else if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(next);
    }
    out
}
