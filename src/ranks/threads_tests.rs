use super::*;

/// What each of so many ranks returns.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&ThreadRank) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads = thread_ranks(ranks).into_iter().map(|rank| scope.spawn(move || work(&rank)));
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn messages_reach_every_rank() {
    for ranks in [1, 2, 3, 5, 8] {
        for root in 0..ranks {
            let got = on_ranks(ranks, |own| {
                own.broadcast(root, vec![own.rank() as u8; root + 1]).unwrap()
            });
            assert!(got.iter().all(|got| *got == vec![root as u8; root + 1]));
        }
        let expected: Vec<Vec<u8>> = (0..ranks).map(|rank| vec![rank as u8; rank]).collect();
        let got =
            on_ranks(ranks, |own| own.gather_all(vec![own.rank() as u8; own.rank()]).unwrap());
        assert!(got.iter().all(|got| *got == expected));
        on_ranks(ranks, |own| own.barrier().unwrap());
    }
}

#[test]
fn a_rank_that_ends_fails_those_that_wait_for_it() {
    let errors = on_ranks(3, |own| match own.rank() {
        1 => None,
        _ => own.receive(1, &mut [0]).err().map(|error| error.message()),
    });
    let ended = Some("rank 1 has ended".to_owned());
    assert_eq!(errors, [ended.clone(), None, ended]);
}
