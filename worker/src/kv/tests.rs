//! What the cache promises, and a model of it that knows who wrote what where.

mod mix;

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const N: usize = BLOCK_TOKENS;

/// A text of its own for each seed; a longer one begins as a shorter one.
fn tokens(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| seed * 100_000 + i).collect()
}

/// Holds `tokens`, computed and made known, in a table.
fn computed(owner: Owner, tokens: &[u32], blocks: &mut Blocks) -> BlockTable {
    let mut table = BlockTable::new(owner);
    table.reuse(tokens, blocks);
    table.reserve(tokens.len(), blocks).unwrap();
    table.publish(tokens, tokens.len(), blocks);
    table
}

/// [`computed`], and let go again.
fn remember(owner: Owner, tokens: &[u32], blocks: &mut Blocks) {
    computed(owner, tokens, blocks).release(blocks);
}

fn found(owner: Owner, tokens: &[u32], blocks: &Blocks) -> usize {
    BlockTable::new(owner).findable(tokens, blocks).0
}

#[test]
fn a_position_finds_its_slot_in_its_own_block() {
    let mut blocks = Blocks::new(4);
    let owner = blocks.add_owner(1);
    let mut other = BlockTable::new(owner);
    let mut table = BlockTable::new(owner);
    table.reserve(N, &mut blocks).unwrap();
    other.reserve(1, &mut blocks).unwrap();
    table.reserve(N + 1, &mut blocks).unwrap();
    assert_eq!(table.ids(N + 1), [0, 2]);
    assert_eq!(table.ids(N), [0]);
    assert_eq!(table.slot(N), Some(2 * N as u32));
    assert_eq!(table.slot(2 * N), None);
}

#[test]
fn what_was_forgotten_is_found_by_nobody_and_free_as_soon_as_nobody_holds_it() {
    let mut blocks = Blocks::new(16);
    let (owner, other) = (blocks.add_owner(1), blocks.add_owner(1));
    remember(owner, &tokens(1, 4 * N), &mut blocks);
    remember(other, &tokens(1, 2 * N), &mut blocks);
    let mut held = computed(owner, &tokens(2, 2 * N), &mut blocks);
    assert_eq!((blocks.idle(), blocks.available()), (6, 14));

    let after = blocks.forget(owner);
    blocks.check();
    assert_eq!((blocks.idle(), blocks.available()), (2, 14));
    for owner in [owner, after] {
        for text in [1, 2] {
            assert_eq!(found(owner, &tokens(text, 5 * N), &blocks), 0);
        }
    }
    assert_eq!(found(other, &tokens(1, 2 * N + 1), &blocks), 2);

    // What goes on computes on, and makes nothing known any more.
    held.reserve(4 * N, &mut blocks).unwrap();
    held.publish(&tokens(2, 4 * N), 4 * N, &mut blocks);
    assert_eq!(found(owner, &tokens(2, 5 * N), &blocks), 0);
    held.release(&mut blocks);
    blocks.check();
    assert_eq!((blocks.owned(after), blocks.idle()), (0, 2));

    // What is asked afterwards is found as ever.
    remember(after, &tokens(1, 4 * N), &mut blocks);
    assert_eq!(found(after, &tokens(1, 5 * N), &blocks), 4);
    blocks.check();
}

#[test]
fn giving_a_block_back_twice_frees_it_once() {
    let mut blocks = Blocks::new(1);
    let owner = blocks.add_owner(1);
    let block = blocks.take(owner).unwrap();
    assert!(blocks.release(block));
    assert!(!blocks.release(block));
    assert_eq!(blocks.available(), 1);
    blocks.check();
}

#[test]
fn full_blocks_are_found_again_up_to_the_last_token_but_one() {
    let mut blocks = Blocks::new(8);
    let owner = blocks.add_owner(1);
    let text = tokens(1, 2 * N + 5);
    remember(owner, &text, &mut blocks);
    assert_eq!((blocks.available(), blocks.idle()), (8, 2));
    assert_eq!(found(owner, &text, &blocks), 2);
    assert_eq!(found(owner, &text[..2 * N + 1], &blocks), 2);
    assert_eq!(
        found(owner, &text[..2 * N], &blocks),
        1,
        "one is left to compute"
    );
    assert_eq!(found(owner, &text[..N], &blocks), 0);
    // The same second block behind another first one is not the same.
    let other = [&tokens(2, N)[..], &text[N..]].concat();
    assert_eq!(found(owner, &other, &blocks), 0);
    let mut late = text.clone();
    late[N] += 1;
    assert_eq!(found(owner, &late, &blocks), 1);
}

#[test]
fn another_tenants_prompt_is_never_found() {
    let mut blocks = Blocks::new(8);
    let (one, other) = (blocks.add_owner(1), blocks.add_owner(1));
    let text = tokens(1, 3 * N);
    remember(one, &text, &mut blocks);
    assert_eq!(found(one, &text, &blocks), 2);
    assert_eq!(found(other, &text, &blocks), 0);
    assert_ne!(prefix::Key::root(one), prefix::Key::root(other));
    let mut table = BlockTable::new(other);
    assert_eq!(table.reuse(&text, &mut blocks), 0);
}

#[test]
fn what_the_other_has_cached_changes_nothing_that_a_tenant_sees() {
    // Twice the same, but for what the first tenant's blocks contain: the second's own prompt, or another.
    let course = |of_first: u32| {
        let mut blocks = Blocks::new(12);
        let (first, second) = (blocks.add_owner(1), blocks.add_owner(1));
        remember(first, &tokens(of_first, 6 * N), &mut blocks);
        let mut seen = Vec::new();
        for seed in [7, 8, 7, 9, 7, 7] {
            let text = tokens(seed, 4 * N);
            let mut table = BlockTable::new(second);
            seen.push(table.reuse(&text, &mut blocks));
            table.reserve(text.len(), &mut blocks).unwrap();
            table.publish(&text, text.len(), &mut blocks);
            seen.extend(table.ids(text.len()).iter().map(|&id| id as usize));
            table.release(&mut blocks);
            seen.extend([blocks.idle(), blocks.evictions() as usize]);
        }
        seen
    };
    assert_eq!(course(7), course(1));
}

#[test]
fn who_asks_much_pushes_out_his_own_blocks() {
    let mut blocks = Blocks::new(16);
    let (quiet, busy) = (blocks.add_owner(1), blocks.add_owner(1));
    let text = tokens(1, 4 * N + 1);
    remember(quiet, &text, &mut blocks);
    for seed in 2..40 {
        remember(busy, &tokens(seed, 4 * N + 1), &mut blocks);
        assert_eq!(found(quiet, &text, &blocks), 4, "after {seed}");
    }
    blocks.check();
    // His latest are still there, from the front.
    assert_eq!(found(busy, &tokens(39, 4 * N + 1), &blocks), 4);
    // Beyond a quarter, his part of the first half, the quiet one's go by use as all others. With three times the weight
    // of the busy one his part is three eighths. (One block is free: a last one that is not full is not kept.)
    for (weight, kept) in [(1, 4), (3, 6)] {
        blocks.set_weight(quiet, weight);
        remember(quiet, &tokens(50 + weight, 8 * N + 1), &mut blocks);
        for seed in 60..80 {
            remember(busy, &tokens(seed, 4 * N + 1), &mut blocks);
        }
        assert_eq!((blocks.owned(quiet), blocks.owned(busy)), (kept, 15 - kept));
    }
    blocks.check();
}

#[test]
fn what_nobody_used_for_long_goes_first_whoever_owns_it() {
    let mut blocks = Blocks::new(8);
    let (quiet, busy) = (blocks.add_owner(1), blocks.add_owner(1));
    remember(quiet, &tokens(1, 2 * N + 1), &mut blocks);
    blocks.advance(PROTECTED_MS + 1);
    for seed in 2..9 {
        remember(busy, &tokens(seed, 4 * N + 1), &mut blocks);
    }
    assert_eq!((blocks.owned(quiet), blocks.owned(busy)), (0, 7));
}

#[test]
fn a_beginning_outlives_what_follows_it() {
    let mut blocks = Blocks::new(6);
    let owner = blocks.add_owner(1);
    let text = tokens(1, 4 * N + 1);
    remember(owner, &text, &mut blocks);
    // Takes three blocks: one is free and one never was known, so one must go.
    let other = computed(owner, &tokens(2, 3 * N), &mut blocks);
    assert_eq!(found(owner, &text, &blocks), 3);
    drop(other);
}

#[derive(Debug, Clone)]
enum Action {
    /// Admit a sequence of an owner: which beginning, how long.
    Begin {
        owner: usize,
        seed: u32,
        len: usize,
    },
    /// Compute so many more tokens of the nth.
    Compute(usize, usize),
    /// Add tokens of its own to the nth, and take wrong ones back.
    Grow(usize, usize, usize),
    End(usize),
    Wait(u64),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        3 => (0usize..3, 0u32..3, 1usize..100).prop_map(|(owner, seed, len)| Action::Begin { owner, seed, len }),
        4 => (0usize..8, 1usize..60).prop_map(|(n, rows)| Action::Compute(n, rows)),
        2 => (0usize..8, 1usize..20, 0usize..20).prop_map(|(n, right, wrong)| Action::Grow(n, right, wrong)),
        2 => (0usize..8).prop_map(Action::End),
        1 => (0u64..PROTECTED_MS).prop_map(Action::Wait),
    ];
    proptest::collection::vec(action, 0..120)
}

/// What the model knows of a sequence.
struct Held {
    owner: usize,
    tokens: Vec<u32>,
    computed: usize,
    table: BlockTable,
}

/// What lies in each position of the cache: who wrote it, and the tokens up to there.
type Cells = HashMap<u32, (usize, Vec<u32>)>;

impl Held {
    /// Computes up to `to` as a step would: reads everything before, writes its own rows.
    fn compute(&mut self, to: usize, cells: &mut Cells, holders: &HashMap<u32, usize>) {
        for position in 0..self.computed {
            let cell = &cells[&self.table.slot(position).unwrap()];
            let (writer, tokens) = cell;
            assert_eq!(*writer, self.owner, "read another tenant's block");
            assert_eq!(
                tokens[..],
                self.tokens[..=position],
                "read what is not its own text"
            );
        }
        for position in self.computed..to {
            let slot = self.table.slot(position).unwrap();
            let block = slot / N as u32;
            assert_eq!(holders[&block], 1, "wrote into a shared block");
            cells.insert(slot, (self.owner, self.tokens[..=position].to_vec()));
        }
        self.computed = to;
    }
}

fn holders(held: &[Held]) -> HashMap<u32, usize> {
    let mut holders = HashMap::new();
    for block in held.iter().flat_map(|h| h.table.ids(usize::MAX)) {
        *holders.entry(block).or_insert(0) += 1;
    }
    holders
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn no_block_is_lost_used_twice_or_read_by_another(total in 1usize..24, actions in actions()) {
        let mut blocks = Blocks::new(total);
        let owners = [1, 2, 5].map(|weight| blocks.add_owner(weight));
        let mut held: Vec<Held> = Vec::new();
        let mut cells = Cells::new();
        let (mut now_ms, mut next) = (0, 1000);
        for action in actions {
            match action {
                Action::Begin { owner, seed, len } => {
                    let tokens = tokens(seed, len);
                    let mut table = BlockTable::new(owners[owner]);
                    let (found, idle) = table.findable(&tokens, &blocks);
                    let fits = BlockTable::blocks_for(len) - found + idle <= blocks.available();
                    let computed = table.reuse(&tokens, &mut blocks);
                    prop_assert_eq!(computed, found * N);
                    prop_assert!(computed < len);
                    match table.reserve(len, &mut blocks) {
                        Ok(()) => {
                            prop_assert!(fits);
                            held.push(Held { owner, tokens, computed, table });
                        }
                        Err(error) => {
                            prop_assert!(!fits && error.needed > error.free);
                            table.release(&mut blocks);
                        }
                    }
                }
                Action::Compute(n, rows) => {
                    let all = holders(&held);
                    if let Some(one) = held.get_mut(n) {
                        let to = (one.computed + rows).min(one.tokens.len());
                        one.compute(to, &mut cells, &all);
                        one.table.publish(&one.tokens, to, &mut blocks);
                    }
                }
                Action::Grow(n, right, wrong) => {
                    if let Some(one) = held.get_mut(n)
                        && one.computed == one.tokens.len()
                    {
                        let len = one.tokens.len();
                        if one.table.reserve(len + right + wrong, &mut blocks).is_err() {
                            continue;
                        }
                        next += 1;
                        one.tokens.extend((0..right as u32).map(|i| next * 1000 + i));
                        one.tokens.extend((0..wrong).map(|_| 7));
                        let all = holders(&held);
                        let one = &mut held[n];
                        one.compute(len + right + wrong, &mut cells, &all);
                        one.tokens.truncate(len + right);
                        one.computed = len + right;
                        one.table.publish(&one.tokens, one.computed, &mut blocks);
                        one.table.shrink(one.tokens.len(), &mut blocks);
                    }
                }
                Action::End(n) => {
                    if n < held.len() {
                        held.swap_remove(n).table.release(&mut blocks);
                    }
                }
                Action::Wait(ms) => {
                    now_ms += ms;
                    blocks.advance(now_ms);
                }
            }
            blocks.check();
            let distinct = holders(&held).len();
            prop_assert_eq!(distinct + blocks.available(), total);
        }
        for mut one in held {
            one.table.release(&mut blocks);
        }
        blocks.check();
        prop_assert_eq!(blocks.available(), total);
    }
}
