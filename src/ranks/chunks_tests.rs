use super::*;

#[test]
fn chunks_cover_the_windows_in_order() {
    for windows in 1..70 {
        let chunks = Chunks::new(windows, 1);
        assert_eq!(chunks.count(), windows.min(8));
        let all: Vec<usize> = (0..chunks.count()).flat_map(|chunk| chunks.windows(chunk)).collect();
        assert_eq!(all, (0..windows).collect::<Vec<_>>());
        let most = (0..chunks.count()).map(|chunk| chunks.windows(chunk).len()).max();
        assert_eq!(most, Some(Chunks::most_windows(windows)));
    }
}

#[test]
fn the_order_is_the_same_for_any_number_of_ranks() {
    let order = |windows, ranks| Chunks::new(windows, ranks).order().collect::<Vec<_>>();
    for ranks in [1, 2, 3, 8, 64] {
        assert_eq!(order(100, ranks), [0, 4, 2, 6, 1, 5, 3, 7]);
        assert_eq!(order(5, ranks), [0, 4, 2, 1, 3]);
        assert_eq!(order(1, ranks), [0]);
    }
}

/// Every rank adds all chunks in order, makes its own sums before they are added, and holds one at most.
#[test]
fn a_rank_holds_one_sum_at_most() {
    for windows in [1, 2, 3, 5, 7, 8, 9, 128] {
        for ranks in [1, 2, 3, 4, 5, 7, 8, 13] {
            let chunks = Chunks::new(windows, ranks);
            for rank in 0..ranks {
                let own = chunks.own(rank);
                let (mut held, mut made, mut added) = (None, 0, Vec::new());
                for step in chunks.steps(rank) {
                    match step {
                        Step::Sum(at) => {
                            assert_eq!((held, at), (None, made));
                            held = Some(own[at]);
                            made += 1;
                        }
                        Step::Add(chunk) => {
                            if chunks.rank(chunk) == rank {
                                assert_eq!(held.take(), Some(chunk));
                            }
                            added.push(chunk);
                        }
                    }
                }
                assert_eq!(added, chunks.order().collect::<Vec<_>>());
                assert_eq!(made, own.len());
            }
            let all: usize = (0..ranks).map(|rank| chunks.own(rank).len()).sum();
            assert_eq!(all, chunks.count());
        }
    }
}

/// Time in sums, where one takes one and additions none: ranks of a power of two do not wait.
#[test]
fn ranks_of_a_power_of_two_make_their_sums_together() {
    let rounds = |ranks: usize| {
        let chunks = Chunks::new(128, ranks);
        // When each chunk's sum is there.
        let mut ready = [None; CHUNKS];
        let mut clocks = vec![0; ranks];
        let mut steps: Vec<_> =
            (0..ranks).map(|rank| chunks.steps(rank).into_iter().peekable()).collect();
        // Rank 0 adds all of them.
        while steps.iter_mut().any(|steps| steps.peek().is_some()) {
            for rank in 0..ranks {
                let own = chunks.own(rank);
                while let Some(step) = steps[rank].peek().copied() {
                    match step {
                        Step::Sum(at) => {
                            clocks[rank] += 1;
                            ready[own[at]] = Some(clocks[rank]);
                        }
                        Step::Add(chunk) if rank == 0 => {
                            let Some(at) = ready[chunk] else { break };
                            clocks[0] = clocks[0].max(at);
                        }
                        Step::Add(_) => {}
                    }
                    steps[rank].next();
                }
            }
        }
        clocks[0]
    };
    assert_eq!([1, 2, 4, 8].map(rounds), [8, 4, 2, 1]);
}
