//! Paragraphs, lists and tables as word processors and web pages nest them, flattened into the builder's blocks.
//!
//! Paragraphs may stand inside paragraphs (notes, text boxes) and tables inside cells; both are held on stacks, so that
//! depth costs memory but never the call stack.

use super::build::Builder;
use super::{ExtractError, fold_line};

/// What a paragraph turns out to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Body,
    Heading(u8),
    /// A list item; its sign is already in the text.
    Item,
}

struct Paragraph {
    kind: Kind,
    text: String,
    /// How many tables were open when it began: it belongs to the innermost one's cell.
    tables: usize,
}

#[derive(Default)]
struct Table {
    rows: Vec<Vec<String>>,
    row: Vec<String>,
    cell: Option<String>,
}

/// Flattens nested structure; call [`Flow::finish`] at the end.
pub(super) struct Flow<'b> {
    pub builder: &'b mut Builder,
    open: Vec<Paragraph>,
    tables: Vec<Table>,
    items: Vec<String>,
}

impl<'b> Flow<'b> {
    pub fn new(builder: &'b mut Builder) -> Self {
        Self {
            builder,
            open: Vec::new(),
            tables: Vec::new(),
            items: Vec::new(),
        }
    }

    pub fn begin(&mut self, kind: Kind) {
        self.open.push(Paragraph {
            kind,
            text: String::new(),
            tables: self.tables.len(),
        });
    }

    pub fn set_kind(&mut self, kind: Kind) {
        if let Some(p) = self.open.last_mut() {
            if p.kind == Kind::Item && matches!(kind, Kind::Heading(_)) {
                // A numbered heading is no item: its sign goes.
                p.text.clear();
            }
            p.kind = kind;
        }
    }

    /// The open paragraph becomes a list item with this sign, unless it is a heading or already one.
    pub fn list_item(&mut self, sign: &str) {
        if let Some(p) = self.open.last_mut()
            && p.kind == Kind::Body
        {
            p.kind = Kind::Item;
            p.text.insert_str(0, sign);
        }
    }

    /// The open paragraph that belongs to where we stand now.
    fn current(&mut self) -> Option<&mut Paragraph> {
        let tables = self.tables.len();
        self.open.last_mut().filter(|p| p.tables == tables)
    }

    pub fn is_open(&mut self) -> bool {
        self.current().is_some()
    }

    /// Text between paragraphs is dropped.
    pub fn text(&mut self, text: &str) {
        if let Some(p) = self.current() {
            p.text.push_str(text);
        }
    }

    pub fn end(&mut self) -> Result<(), ExtractError> {
        if !self.is_open() {
            return Ok(());
        }
        match self.open.pop() {
            Some(p) => self.emit(p.kind, &p.text),
            None => Ok(()),
        }
    }

    fn emit(&mut self, kind: Kind, text: &str) -> Result<(), ExtractError> {
        if text.trim().is_empty() {
            return Ok(());
        }
        if let Some(table) = self.tables.last_mut() {
            append(table.cell.get_or_insert_default(), text);
            return Ok(());
        }
        if kind == Kind::Item {
            self.items.push(text.to_string());
            return Ok(());
        }
        self.flush_items()?;
        match kind {
            Kind::Heading(level) => self.builder.heading(level, text),
            _ => self.builder.paragraph(text),
        }
    }

    fn flush_items(&mut self) -> Result<(), ExtractError> {
        if self.items.is_empty() {
            return Ok(());
        }
        self.builder.list(&std::mem::take(&mut self.items))
    }

    /// What stood before is on the page before, what follows on the next one.
    pub fn page_break(&mut self) -> Result<(), ExtractError> {
        if self.tables.len() > 1 {
            return Ok(());
        }
        if let Some(table) = self.tables.last_mut() {
            let rows = std::mem::take(&mut table.rows);
            self.flush_items()?;
            self.builder.table(&rows)?;
        } else if let Some(p) = self.current() {
            let (kind, text) = (p.kind, std::mem::take(&mut p.text));
            if !text.trim().is_empty() {
                // The rest of a broken heading or item is plain text of the next page.
                self.set_kind(Kind::Body);
            }
            self.emit(kind, &text)?;
            self.flush_items()?;
        } else {
            self.flush_items()?;
        }
        self.builder.page_break();
        Ok(())
    }

    pub fn begin_table(&mut self) -> Result<(), ExtractError> {
        if self.tables.is_empty() {
            self.flush_items()?;
        }
        self.tables.push(Table::default());
        Ok(())
    }

    pub fn begin_cell(&mut self) {
        self.end_cell();
        if let Some(table) = self.tables.last_mut() {
            table.cell = Some(String::new());
        }
    }

    pub fn end_cell(&mut self) {
        if let Some(table) = self.tables.last_mut()
            && let Some(cell) = table.cell.take()
        {
            table.row.push(cell);
        }
    }

    pub fn end_row(&mut self) {
        self.end_cell();
        if let Some(table) = self.tables.last_mut() {
            let row = std::mem::take(&mut table.row);
            if row.iter().any(|c| !c.trim().is_empty()) {
                table.rows.push(row);
            }
        }
    }

    pub fn end_table(&mut self) -> Result<(), ExtractError> {
        self.end_row();
        while self
            .open
            .last()
            .is_some_and(|p| p.tables >= self.tables.len() && p.tables > 0)
        {
            self.open.pop();
        }
        let Some(table) = self.tables.pop() else {
            return Ok(());
        };
        match self.tables.last_mut() {
            // A table inside a cell becomes that cell's text.
            Some(outer) => {
                let cell = outer.cell.get_or_insert_default();
                table
                    .rows
                    .iter()
                    .for_each(|row| append(cell, &row.join(" ")));
                Ok(())
            }
            None => self.builder.table(&table.rows),
        }
    }

    pub fn finish(mut self) -> Result<(), ExtractError> {
        while !self.tables.is_empty() {
            self.end_table()?;
        }
        while self.is_open() {
            self.end()?;
        }
        self.flush_items()
    }
}

fn append(cell: &mut String, text: &str) {
    if !cell.is_empty() {
        cell.push(' ');
    }
    cell.push_str(&fold_line(text));
}
