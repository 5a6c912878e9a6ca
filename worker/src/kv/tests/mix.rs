//! What separate shares cost in hits, on a mix of tenants as a portal has it.

use super::*;

/// Which prompts come, from a small generator of its own (Knuth's MMIX), so that every run is the same.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    /// 0 to n - 1, the k-th with a probability in proportion to 1 / (k + 1).
    fn zipf(&mut self, n: u64) -> u64 {
        let weight = |k: u64| 1_000_000 / (k + 1);
        let mut left = self.below((0..n).map(weight).sum());
        (0..n)
            .find(|&k| match left.checked_sub(weight(k)) {
                Some(rest) => {
                    left = rest;
                    false
                }
                None => true,
            })
            .unwrap_or(0)
    }
}

/// Block-sized pieces of text by a name: equal names, equal tokens.
fn piece(name: [u64; 3], blocks: usize) -> Vec<u32> {
    let name = name.iter().fold(17u64, |h, n| {
        (h ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    });
    (0..(blocks * N) as u64)
        .map(|i| (name.wrapping_add(i * 0x51ed_270b) >> 20) as u32)
        .collect()
}

/// Requests of twelve municipalities of very different size, in order: (tenant, prompt). Each has its own instructions of
/// 20 blocks behind two that all share, forty passages of 8 blocks of which some are asked for much more often, and
/// conversations of up to six turns.
fn requests(count: usize, random: &mut Random) -> Vec<(usize, Vec<u32>)> {
    let mut talks: Vec<Vec<Vec<u32>>> = vec![Vec::new(); 12];
    let mut requests = Vec::new();
    for number in 0..count as u64 {
        let tenant = random.zipf(12);
        let talks = &mut talks[tenant as usize];
        let goes_on = !talks.is_empty() && random.below(3) > 0;
        let mut text = if goes_on {
            let which = random.below(talks.len() as u64) as usize;
            talks.swap_remove(which)
        } else {
            let passage = piece([tenant, 2, random.zipf(40)], 8);
            [piece([0, 0, 0], 2), piece([tenant, 1, 0], 20), passage].concat()
        };
        text.extend(piece([tenant, 3, number], 1 + random.below(4) as usize));
        text.push(0);
        requests.push((tenant as usize, text.clone()));
        text.pop();
        // The answer belongs to the conversation.
        text.extend(piece([tenant, 4, number], 1 + random.below(8) as usize));
        if random.below(6) > 0 {
            talks.push(text);
        }
        if talks.len() > 8 {
            talks.remove(0);
        }
    }
    requests
}

/// Blocks found when `owner_of` says whose cache each tenant uses.
fn hits(requests: &[(usize, Vec<u32>)], total: usize, owner_of: fn(usize) -> usize) -> usize {
    let mut blocks = Blocks::new(total);
    let owners: Vec<Owner> = (0..12).map(|_| blocks.add_owner(1)).collect();
    let mut running: Vec<BlockTable> = Vec::new();
    let mut hits = 0;
    for (number, (tenant, text)) in requests.iter().enumerate() {
        blocks.advance(number as u64 * 500);
        if running.len() == 8 {
            running.remove(0).release(&mut blocks);
        }
        let mut table = BlockTable::new(owners[owner_of(*tenant)]);
        hits += table.reuse(text, &mut blocks) / N;
        table.reserve(text.len(), &mut blocks).unwrap();
        table.publish(text, text.len(), &mut blocks);
        running.push(table);
    }
    blocks.check();
    hits
}

#[test]
fn shares_of_their_own_cost_tenants_less_than_a_twentieth_of_the_hits() {
    let requests = requests(6000, &mut Random(42));
    let asked: usize = requests.iter().map(|(_, text)| text.len() / N).sum();
    for total in [800, 1500, 3000, 6000] {
        let own = hits(&requests, total, |tenant| tenant);
        let global = hits(&requests, total, |_| 0);
        println!("{total} blocks: {own} of {asked} found, {global} by one cache for all");
        assert!(
            own * 100 >= global * 95,
            "{total} blocks: {own} against {global}"
        );
    }
}
