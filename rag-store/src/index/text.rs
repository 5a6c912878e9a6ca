//! Full text of one tenant: a tantivy index in memory (its terms are clear text), scored by BM25.

use std::collections::HashMap;

use tantivy::collector::TopDocs;
use tantivy::query::{BooleanQuery, BoostQuery, ConstScoreQuery, Occur, Query, TermQuery};
use tantivy::schema::{
    FAST, Field, INDEXED, IndexRecordOption, Schema, TextFieldIndexing, TextOptions,
};
use tantivy::tokenizer::{PreTokenizedString, Token};
use tantivy::{
    Index, IndexReader, IndexWriter, ReloadPolicy, Searcher, TantivyDocument, TantivyError, Term,
};

use super::german::{self, QueryWord, Terms};
use crate::store::CollectionId;

/// The least that tantivy takes; the arena grows only as it fills.
const WRITER_BYTES: usize = 15_000_000;

/// What a match is worth by where it stands: the word itself in the text, in a heading or title, and as a part of a compound.
const BODY_BOOST: f32 = 1.0;
const HEAD_BOOST: f32 = 0.7;
const PARTS_BOOST: f32 = 0.4;
/// A part of a searched compound, against the compound itself.
const QUERY_PART_BOOST: f32 = 0.5;

/// A chunk as full text sees it.
pub struct TextEntry {
    /// Unique in this index.
    pub key: u64,
    pub collection: CollectionId,
    /// Title of the document and headings above the chunk.
    pub head: Terms,
    pub body: Terms,
}

/// What the index knows of a query's words.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QueryFacts {
    /// Inverse document frequency of each searched word, and whether it occurs at all.
    pub words: Vec<(f32, bool)>,
    /// Whether a section number is asked for.
    pub section: bool,
    /// Score of the best hit against the most that any text could score.
    pub best_share: f32,
}

/// Full text of one tenant.
pub struct TextIndex {
    index: Index,
    reader: IndexReader,
    key: Field,
    collection: Field,
    head: Field,
    body: Field,
    parts: Field,
}

impl TextIndex {
    /// An empty index in memory.
    pub fn new() -> Result<Self, TantivyError> {
        let mut schema = Schema::builder();
        let text = |option| {
            let indexing = TextFieldIndexing::default()
                .set_tokenizer("raw")
                .set_index_option(option);
            TextOptions::default().set_indexing_options(indexing)
        };
        let key = schema.add_u64_field("key", FAST | INDEXED);
        let collection = schema.add_text_field("collection", text(IndexRecordOption::Basic));
        let head = schema.add_text_field("head", text(IndexRecordOption::WithFreqs));
        let body = schema.add_text_field("body", text(IndexRecordOption::WithFreqs));
        let parts = schema.add_text_field("parts", text(IndexRecordOption::WithFreqs));
        let index = Index::builder().schema(schema.build()).create_in_ram()?;
        let reader = index
            .reader_builder()
            .reload_policy(ReloadPolicy::Manual)
            .try_into()?;
        Ok(Self {
            index,
            reader,
            key,
            collection,
            head,
            body,
            parts,
        })
    }

    /// Removes some chunks and adds others, seen together.
    pub fn update(
        &mut self,
        removed: &[u64],
        added: impl IntoIterator<Item = TextEntry>,
    ) -> Result<(), TantivyError> {
        // A writer holds threads and an arena: it lives for one batch only, since a node has an index a tenant.
        let mut writer: IndexWriter<TantivyDocument> =
            self.index.writer_with_num_threads(1, WRITER_BYTES)?;
        for key in removed {
            writer.delete_term(Term::from_field_u64(self.key, *key));
        }
        for entry in added {
            let (head, body) = (entry.head, entry.body);
            let mut document = TantivyDocument::default();
            document.add_u64(self.key, entry.key);
            document
                .add_pre_tokenized_text(self.collection, tokens([entry.collection.to_string()]));
            document.add_pre_tokenized_text(self.head, tokens(head.words));
            document.add_pre_tokenized_text(self.body, tokens(body.words));
            document.add_pre_tokenized_text(
                self.parts,
                tokens(body.parts.into_iter().chain(head.parts)),
            );
            writer.add_document(document)?;
        }
        writer.commit()?;
        writer.wait_merging_threads()?;
        self.reader.reload()
    }

    /// The best chunks of the permitted collections (`None`: all) as (key, BM25 score), best first, with what is known of the
    /// query.
    pub fn search(
        &self,
        query: &str,
        permitted: Option<&[CollectionId]>,
        limit: usize,
    ) -> Result<(Vec<(u64, f32)>, QueryFacts), TantivyError> {
        let searcher = self.reader.searcher();
        let mut words = german::query_words(query);
        let mut facts = QueryFacts {
            section: words.iter().any(|w| w.stem.starts_with('§')),
            ..QueryFacts::default()
        };
        let mut clauses: Vec<(Occur, Box<dyn Query>)> = Vec::new();
        for word in &mut words {
            let (mut found, mut idf) = self.idf(&searcher, word)?;
            // Written without umlauts, as on a foreign keyboard.
            if !found && let Some(umlauts) = word.with_umlauts() {
                let (known, its_idf) = self.idf(&searcher, &umlauts)?;
                if known || word.parts.is_empty() && !umlauts.parts.is_empty() {
                    (found, idf) = (known, its_idf);
                    *word = umlauts;
                }
            }
            facts.words.push((idf, found));
            clauses.extend(
                self.word_clauses(word)
                    .into_iter()
                    .map(|query| (Occur::Should, query)),
            );
        }
        if clauses.is_empty() || limit == 0 || searcher.num_docs() == 0 {
            return Ok((Vec::new(), facts));
        }
        let mut query: Box<dyn Query> = Box::new(BooleanQuery::new(clauses));
        if let Some(permitted) = permitted {
            let of_collection = |id: &CollectionId| -> (Occur, Box<dyn Query>) {
                let term = Term::from_field_text(self.collection, &id.to_string());
                (
                    Occur::Should,
                    Box::new(TermQuery::new(term, IndexRecordOption::Basic)),
                )
            };
            let any = BooleanQuery::new(permitted.iter().map(of_collection).collect());
            let filter = ConstScoreQuery::new(Box::new(any), 0.0);
            query = Box::new(BooleanQuery::new(vec![
                (Occur::Must, query),
                (Occur::Must, Box::new(filter)),
            ]));
        }
        let top = searcher.search(&*query, &TopDocs::with_limit(limit).order_by_score())?;
        let mut hits = Vec::with_capacity(top.len());
        let mut columns = HashMap::new();
        for (score, address) in top {
            let column = match columns.entry(address.segment_ord) {
                std::collections::hash_map::Entry::Occupied(there) => there.into_mut(),
                std::collections::hash_map::Entry::Vacant(gap) => gap.insert(
                    searcher
                        .segment_reader(address.segment_ord)
                        .fast_fields()
                        .u64("key")?,
                ),
            };
            if let Some(key) = column.first(address.doc_id) {
                hits.push((key, score));
            }
        }
        // Equal scores in the order of the keys, which does not depend on how segments were merged.
        hits.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        // BM25's term weight stays below (k1 + 1) = 2.2 times the idf.
        let most: f32 = facts.words.iter().map(|(idf, _)| 2.2 * idf).sum();
        facts.best_share = hits.first().map_or(0.0, |(_, score)| {
            if most > 0.0 {
                (score / most).min(1.0)
            } else {
                0.0
            }
        });
        Ok((hits, facts))
    }

    /// A word's clauses: as written, and its parts where it is a compound.
    fn word_clauses(&self, word: &QueryWord) -> Vec<Box<dyn Query>> {
        let clause = |field: Field, stem: &str, boost: f32| -> Box<dyn Query> {
            let term = TermQuery::new(
                Term::from_field_text(field, stem),
                IndexRecordOption::WithFreqs,
            );
            Box::new(BoostQuery::new(Box::new(term), boost))
        };
        let mut clauses = vec![
            clause(self.body, &word.stem, BODY_BOOST),
            clause(self.head, &word.stem, HEAD_BOOST),
            clause(self.parts, &word.stem, PARTS_BOOST),
        ];
        for part in &word.parts {
            clauses.push(clause(self.body, part, BODY_BOOST * QUERY_PART_BOOST));
            clauses.push(clause(self.head, part, HEAD_BOOST * QUERY_PART_BOOST));
            clauses.push(clause(self.parts, part, PARTS_BOOST * QUERY_PART_BOOST));
        }
        clauses
    }

    /// Whether a word occurs, and its inverse document frequency (that of a word in no text, where it does not).
    fn idf(&self, searcher: &Searcher, word: &QueryWord) -> Result<(bool, f32), TantivyError> {
        let mut documents = 0;
        for field in [self.body, self.head, self.parts] {
            documents =
                documents.max(searcher.doc_freq(&Term::from_field_text(field, &word.stem))?);
        }
        let (n, df) = (searcher.num_docs() as f32, documents as f32);
        Ok((
            documents > 0,
            (1.0 + (n - df + 0.5).max(0.0) / (df + 0.5)).ln(),
        ))
    }
}

fn tokens(words: impl IntoIterator<Item = String>) -> PreTokenizedString {
    let token = |(position, text)| Token {
        offset_from: 0,
        offset_to: 0,
        position,
        text,
        position_length: 1,
    };
    PreTokenizedString {
        text: String::new(),
        tokens: words.into_iter().enumerate().map(token).collect(),
    }
}
