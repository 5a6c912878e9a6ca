//! Takes out of a PDF what would make its reader recurse without end or decode pictures as text.

use std::collections::{HashMap, HashSet};

use pdf_extract::{Dictionary, Document, Object, ObjectId};

use super::super::ExtractError;

/// Deeper nesting of page trees and of forms in forms occurs only in hostile files.
const MAX_DEPTH: usize = 64;

pub(super) fn disarm(document: &mut Document) -> Result<(), ExtractError> {
    for object in document.objects.values_mut() {
        let Object::Stream(stream) = object else {
            continue;
        };
        match stream.dict.get(b"Subtype").and_then(Object::as_name) {
            Ok(b"Image") => {
                // Drawn like a form by pdf-extract: an empty one has no text.
                stream.content.clear();
                stream.dict.remove(b"Filter");
                stream.dict.remove(b"DecodeParms");
                stream.dict.set("Resources", Dictionary::new());
            }
            // Without resources of its own a form inherits its caller's, in which it may find itself.
            Ok(b"Form") if !stream.dict.has(b"Resources") => {
                stream.dict.set("Resources", Dictionary::new())
            }
            _ => {}
        }
    }
    if document
        .get_pages()
        .into_values()
        .all(|page| parents_end(document, page))
        && forms_end(document)
    {
        Ok(())
    } else {
        Err(ExtractError::broken(
            "its pages or forms contain themselves",
        ))
    }
}

fn parents_end(document: &Document, page: ObjectId) -> bool {
    let mut id = page;
    for _ in 0..MAX_DEPTH {
        let parent = document
            .get_dictionary(id)
            .and_then(|d| d.get(b"Parent"))
            .and_then(Object::as_reference);
        let Ok(parent) = parent else { return true };
        id = parent;
    }
    false
}

/// Whether following forms from form to form ends, however one goes.
fn forms_end(document: &Document) -> bool {
    let forms: HashMap<ObjectId, Vec<ObjectId>> = document
        .objects
        .iter()
        .filter_map(|(id, object)| {
            object
                .as_stream()
                .ok()
                .map(|stream| (*id, children(document, &stream.dict)))
        })
        .filter(|(_, children)| !children.is_empty())
        .collect();
    let mut finished: HashSet<ObjectId> = HashSet::new();
    for start in forms.keys() {
        // The path from `start`, with how many children of each step were followed.
        let mut path: Vec<(ObjectId, usize)> = vec![(*start, 0)];
        while let Some((id, followed)) = path.last_mut() {
            let (id, next) = (*id, forms.get(id).and_then(|c| c.get(*followed)).copied());
            *followed += 1;
            match next {
                None => {
                    finished.insert(id);
                    path.pop();
                }
                Some(child) if finished.contains(&child) => {}
                Some(child)
                    if path.len() >= MAX_DEPTH || path.iter().any(|(on, _)| *on == child) =>
                {
                    return false;
                }
                Some(child) => path.push((child, 0)),
            }
        }
    }
    true
}

fn children(document: &Document, form: &Dictionary) -> Vec<ObjectId> {
    let dictionary = |holder: &Dictionary, key: &[u8]| -> Option<Dictionary> {
        let (_, object) = document.dereference(holder.get(key).ok()?).ok()?;
        object.as_dict().ok().cloned()
    };
    let Some(objects) =
        dictionary(form, b"Resources").and_then(|resources| dictionary(&resources, b"XObject"))
    else {
        return Vec::new();
    };
    objects
        .iter()
        .filter_map(|(_, object)| object.as_reference().ok())
        .collect()
}
