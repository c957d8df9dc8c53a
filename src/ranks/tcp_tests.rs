use std::sync::mpsc::channel;
use std::thread::{scope, spawn};
use std::time::{Duration, Instant};

use super::*;
use crate::Kind;

fn place(rank: usize, ranks: usize, address: &str) -> Place {
    Place { rank, ranks, local_rank: rank, local_ranks: None, address: address.to_owned() }
}

fn quiet() -> Notify {
    Arc::new(|_| {})
}

/// What each of so many ranks returns, connected by sockets.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&TcpRanks) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = &listener.local_addr().unwrap().to_string();
    let mut listener = Some(listener);
    scope(|scope| {
        let work = &work;
        let threads = (0..ranks).map(|rank| {
            let listener = listener.take();
            scope.spawn(move || {
                let place = place(rank, ranks, address);
                let joined =
                    TcpRanks::join(place, listener, quiet(), Unnoticed::GoesOn, &mut || Ok(()));
                work(&joined.unwrap())
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn messages_reach_every_process() {
    for ranks in [2, 3, 5] {
        let got = on_ranks(ranks, |own| {
            let all = own.gather_all(vec![own.rank() as u8; 1 << 20]).unwrap();
            own.barrier().unwrap();
            let root = ranks - 1;
            let last = own.broadcast(root, vec![own.rank() as u8; 3]).unwrap();
            own.finish(Ok((all, last))).unwrap()
        });
        for (all, last) in got {
            assert!(all.iter().enumerate().all(|(rank, all)| *all == vec![rank as u8; 1 << 20]));
            assert_eq!(last, vec![ranks as u8 - 1; 3]);
        }
    }
}

#[test]
fn the_error_of_a_rank_is_that_of_all() {
    for failing in 0..3 {
        let start = Instant::now();
        let errors = on_ranks(3, |own| {
            let result = match own.rank() == failing {
                true => Err(Error::input("no such weight").hint("look")),
                // The others wait for it, or for each other.
                false => own.receive((own.rank() + 1) % 3, &mut [0; 8]),
            };
            own.finish(result).unwrap_err()
        });
        assert!(start.elapsed() < Duration::from_secs(10));
        for (rank, error) in errors.into_iter().enumerate() {
            assert_eq!((error.kind(), error.hint_text()), (Kind::Input, Some("look")));
            let expected = match rank == failing {
                true => "no such weight".to_owned(),
                false => format!("rank {failing}: no such weight"),
            };
            assert_eq!(error.message(), expected);
        }
    }
}

#[test]
fn a_process_that_vanishes_ends_the_others() {
    let errors = on_ranks(3, |own| {
        if own.rank() == 1 {
            // As the system does with what a killed process has open.
            own.control.vanish();
            return None;
        }
        let result = own.receive(1, &mut [0; 8]);
        Some(own.finish(result).unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        assert_eq!(error.kind(), Kind::Machine);
        assert!(error.message().starts_with("rank 1: it has ended without a word"), "{error}");
    }
}

/// Two ranks that are soon impatient, and what rank 0 says meanwhile.
fn impatient(work: impl Fn(&TcpRanks) -> Result<()> + Sync) -> (Vec<Result<()>>, Vec<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = &listener.local_addr().unwrap().to_string();
    let mut listener = Some(listener);
    let said = Arc::new(Mutex::new(Vec::new()));
    let [beat, silent, gone, waiting] = [10, 200, 2500, 1000].map(Duration::from_millis);
    let patience = Patience { beat, silent, gone, waiting };
    let results = scope(|scope| {
        let work = &work;
        let threads = [0, 1].map(|rank| {
            let (listener, said) = (listener.take(), Arc::clone(&said));
            scope.spawn(move || {
                let notify: Notify = match rank {
                    0 => Arc::new(move |sentence| said.lock().unwrap().push(sentence)),
                    _ => quiet(),
                };
                let place = place(rank, 2, address);
                let waiting = &mut Waiting { notify: &|_| {}, check: &mut || Ok(()) };
                let connections = meet(&place, listener, waiting).unwrap();
                let options = (Unnoticed::GoesOn, patience);
                let own = TcpRanks::of(place, connections, notify, options).unwrap();
                own.finish(work(&own))
            })
        });
        threads.map(|thread| thread.join().unwrap()).into()
    });
    let said = said.lock().unwrap().clone();
    (results, said)
}

#[test]
fn a_rank_that_others_wait_for_is_named_and_waited_for() {
    let (results, said) = impatient(|own| {
        if own.rank() == 1 {
            std::thread::sleep(Duration::from_millis(2600));
            return own.send(0, &[1]);
        }
        own.receive(1, &mut [0])
    });
    assert!(results.iter().all(Result::is_ok));
    assert!(
        said.iter().any(|said| said.contains("rank 1 on ") && said.contains("waited for")),
        "{said:?}"
    );
}

#[test]
fn a_rank_without_signs_of_life_is_named_and_given_up() {
    let (results, said) = impatient(|own| {
        if own.rank() == 1 {
            own.control.freeze();
            std::thread::sleep(Duration::from_millis(200));
        }
        own.receive(1 - own.rank(), &mut [0])
    });
    assert!(said[0].contains("rank 1 on ") && said[0].contains("no sign of life"), "{said:?}");
    let error = results[0].as_ref().unwrap_err();
    assert!(error.message().starts_with("rank 1: no sign of life from "), "{error}");
    assert!(results[1].is_err());
}

#[test]
fn ranks_that_disagree_are_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let other = place(1, 3, &address);
    let other = spawn(move || {
        TcpRanks::join(other, None, quiet(), Unnoticed::GoesOn, &mut || Ok(())).err()
    });
    let own = TcpRanks::join(
        place(0, 2, &address),
        Some(listener),
        quiet(),
        Unnoticed::GoesOn,
        &mut || Ok(()),
    );
    for error in [own.err(), other.join().unwrap()] {
        let error = error.unwrap();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.message().contains("counts 3 ranks, and rank 0 2"), "{error}");
    }
}

#[test]
fn strangers_are_not_taken_for_ranks() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, receiver) = channel();
    let first = place(0, 2, &address);
    let first = spawn(move || {
        sender.send(()).unwrap();
        TcpRanks::join(first, Some(listener), quiet(), Unnoticed::GoesOn, &mut || Ok(()))
            .unwrap()
            .rank()
    });
    receiver.recv().unwrap();
    TcpStream::connect(&address).unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let own =
        TcpRanks::join(place(1, 2, &address), None, quiet(), Unnoticed::GoesOn, &mut || Ok(()))
            .unwrap();
    assert_eq!((first.join().unwrap(), own.rank()), (0, 1));
}
