//! Which rank quantizes which linears of a site.

use std::ops::Range;

use crate::ranks::Chunks;

/// A site's linears in parts, each of which one rank quantizes. Linears of a part are quantized together, on any number of
/// ranks: products of other shapes may round differently on a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SiteParts(Vec<(Range<usize>, usize)>);

impl SiteParts {
    /// All of so many linears with one rank.
    pub(super) fn whole(linears: usize, owner: usize) -> Self {
        Self(vec![(0..linears, owner)])
    }

    /// So many linears divided among ranks, in up to eight parts; of more linears pairs, gate and up of an expert, stay
    /// together.
    pub(super) fn divided(linears: usize, ranks: usize) -> Self {
        let unit = if linears > 2 { 2 } else { 1 };
        let chunks = Chunks::new(linears.div_ceil(unit), ranks);
        let part = |chunk: usize| {
            let Range { start, end } = chunks.windows(chunk);
            (unit * start..(unit * end).min(linears), chunks.rank(chunk))
        };
        Self((0..chunks.count()).map(part).collect())
    }

    /// The rank that the site's sums are added on.
    pub(super) fn owner(&self) -> usize {
        self.0[0].1
    }

    /// The other ranks that have a part.
    pub(super) fn others(&self) -> Vec<usize> {
        let mut ranks: Vec<usize> = self.0.iter().map(|(_, rank)| *rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks.retain(|rank| *rank != self.owner());
        ranks
    }

    /// The parts of a rank.
    pub(super) fn of(&self, rank: usize) -> impl Iterator<Item = Range<usize>> {
        self.0.iter().filter(move |(_, owner)| *owner == rank).map(|(part, _)| part.clone())
    }

    /// The rank of a linear.
    pub(super) fn rank(&self, linear: usize) -> usize {
        let part = self.0.iter().find(|(part, _)| part.contains(&linear));
        part.expect("every linear is in a part").1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linears_are_divided_and_those_of_an_expert_stay_together() {
        let parts = SiteParts::divided(18, 2);
        assert_eq!((parts.owner(), parts.others()), (0, vec![1]));
        let of = |rank| parts.of(rank).map(|part| part.len()).collect::<Vec<_>>();
        assert_eq!(of(0).iter().chain(&of(1)).sum::<usize>(), 18);
        assert!(
            (0..18).all(|linear| parts.of(parts.rank(linear)).any(|part| part.contains(&linear)))
        );
        // The same parts on one rank.
        let all: Vec<_> = (0..2).flat_map(|rank| parts.of(rank)).collect();
        assert_eq!(SiteParts::divided(18, 1).of(0).collect::<Vec<_>>(), all);
        // gate and up of a dense block.
        let parts = SiteParts::divided(2, 2);
        assert_eq!([0, 1].map(|linear| parts.rank(linear)), [0, 1]);
        let whole = SiteParts::whole(3, 1);
        assert_eq!((whole.owner(), whole.others(), whole.rank(2)), (1, vec![], 1));
    }
}
