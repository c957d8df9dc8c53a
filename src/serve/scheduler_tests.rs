use super::super::sampling::{Choice, Sampling};
use super::super::sequence::End;
use super::*;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::tests::device;
use crate::hub;
use crate::network::Runnable;
use crate::progress::Silent;
use crate::quant::kv::KvFormat;

/// Calls `test` with a decoder of the bundled model, its cache in 4 bits.
fn with_decoder(test: impl FnOnce(&Decoder<'_, Cpu>)) {
    let (cpu, source) = (Cpu::new().unwrap(), hub::tiny_llama().unwrap());
    let mut model = Runnable::source(&cpu, &source, &Silent).unwrap();
    model.kv = KvFormat { bits: 4, rotate: true, ..KvFormat::FULL };
    test(&Decoder::load(model, &Silent).unwrap());
}

fn request(prompt: usize, most_new: usize, seed: u64) -> Request {
    let token = |i: usize| ((i * i * 31 + 7 * i + 13 * prompt) % 4096) as u32;
    let sampling = match seed {
        0 => Sampling::GREEDY,
        _ => Sampling { temperature: 0.9, top_k: 50, ..Sampling::GREEDY },
    };
    Request {
        prompt: (0..prompt).map(token).collect(),
        most_new,
        stop: Vec::new(),
        sampling,
        seed,
        keep: false,
        scored: Vec::new(),
    }
}

const LIMITS: Limits = Limits { batch: 8, step_tokens: 512, longest: 256, pages: 32 };

/// Tokens and log-probabilities by sequence, in the order in which they were submitted.
fn run<B: Backend + Decode>(
    decoder: &Decoder<'_, B>,
    limits: Limits,
    requests: &[Request],
) -> Vec<Vec<(u32, u64)>> {
    let mut scheduler = Scheduler::new(decoder, limits).unwrap();
    let ids: Vec<SequenceId> =
        requests.iter().map(|request| scheduler.submit(request.clone()).unwrap()).collect();
    let mut made = vec![Vec::new(); ids.len()];
    while scheduler.unfinished() > 0 {
        assert!(scheduler.running() <= limits.batch);
        for Produced { sequence, choice, .. } in scheduler.step().unwrap() {
            let Choice { token, log_probability } = choice;
            let own = ids.iter().position(|id| *id == sequence).unwrap();
            made[own].push((token, log_probability.to_bits()));
        }
    }
    assert_eq!(scheduler.pages.free(), scheduler.pages.all(), "pages were lost");
    made
}

#[test]
fn what_shares_a_step_changes_no_token() {
    with_decoder(|decoder| {
        let requests = [(3, 20, 0), (90, 9, 1), (1, 30, 2), (70, 2, 0), (64, 17, 3), (40, 1, 4)]
            .map(|(prompt, most_new, seed)| request(prompt, most_new, seed));
        let alone: Vec<_> = requests
            .iter()
            .map(|own| run(decoder, LIMITS, std::slice::from_ref(own)).remove(0))
            .collect();
        for (own, request) in alone.iter().zip(&requests) {
            assert_eq!(own.len(), request.most_new);
        }
        for limits in [
            LIMITS,
            Limits { batch: 2, ..LIMITS },
            // Prompts take several steps, and wait for pages.
            Limits { step_tokens: 7, ..LIMITS },
            Limits { pages: 3, ..LIMITS },
        ] {
            assert!(run(decoder, limits, &requests) == alone, "{limits:?}");
        }
        let backwards: Vec<Request> = requests.iter().rev().cloned().collect();
        let mut found = run(decoder, LIMITS, &backwards);
        found.reverse();
        assert!(found == alone);
    });
}

#[test]
fn a_stop_token_ends_a_sequence_and_a_forced_length_does_not() {
    with_decoder(|decoder| {
        let free = run(decoder, LIMITS, &[request(20, 12, 0)]).remove(0);
        let stop = free[4].0;
        let first = free.iter().position(|(token, _)| *token == stop).unwrap();
        let mut scheduler = Scheduler::new(decoder, LIMITS).unwrap();
        scheduler.submit(Request { stop: vec![4095, stop], ..request(20, 12, 0) }).unwrap();
        let mut made = Vec::new();
        while scheduler.unfinished() > 0 {
            made.extend(scheduler.step().unwrap());
        }
        let tokens: Vec<u32> = made.iter().map(|produced| produced.choice.token).collect();
        let expected: Vec<u32> = free[..=first].iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, expected);
        assert_eq!(made.last().unwrap().end, Some(End::Stop));
        assert!(made[..made.len() - 1].iter().all(|produced| produced.end.is_none()));
        assert!(scheduler.step().unwrap().is_empty(), "nothing is left to do");
    });
}

#[test]
fn a_kept_sequence_goes_on_as_if_it_were_computed_again() {
    with_decoder(|decoder| {
        let mut scheduler = Scheduler::new(decoder, LIMITS).unwrap();
        let finish = |scheduler: &mut Scheduler<'_, '_, Cpu>| {
            let mut made = Vec::new();
            let mut steps = 0;
            while scheduler.unfinished() > 0 {
                let step = scheduler.step().unwrap();
                made.extend(step.iter().map(|produced| produced.choice));
                steps += 1;
            }
            (made, steps)
        };
        let first = request(50, 10, 0);
        let kept = scheduler.submit(Request { keep: true, ..first.clone() }).unwrap();
        let (made, _) = finish(&mut scheduler);
        // The conversation goes on, then goes back to its tenth token.
        let mut text = first.prompt.clone();
        text.extend(made.iter().map(|choice| choice.token));
        text.extend([5, 6, 7]);
        let back = [&text[..10], &[9, 8, 7, 6]].concat();
        let mut id = kept;
        for prompt in [text, back] {
            let more = Request { prompt, keep: true, ..request(1, 6, 0) };
            id = scheduler.resume(id, more.clone()).unwrap();
            let (found, _) = finish(&mut scheduler);
            let again = run(decoder, LIMITS, &[Request { keep: false, ..more }]).remove(0);
            let found: Vec<(u32, u64)> =
                found.iter().map(|own| (own.token, own.log_probability.to_bits())).collect();
            assert_eq!(found, again);
        }
    });
}

#[test]
fn scored_tokens_have_the_probabilities_that_they_are_drawn_by() {
    with_decoder(|decoder| {
        let mut scheduler = Scheduler::new(decoder, LIMITS).unwrap();
        let likeliest = run(decoder, LIMITS, &[request(9, 1, 0)])[0][0];
        let scored = vec![likeliest.0, 17];
        scheduler.submit(Request { scored, ..request(9, 1, 0) }).unwrap();
        let produced = scheduler.step().unwrap().remove(0);
        assert_eq!(produced.scored[0].to_bits(), likeliest.1);
        assert!(produced.scored[1] < produced.scored[0]);
    });
}

#[test]
fn what_can_never_fit_is_refused_and_what_fits_later_waits() {
    with_decoder(|decoder| {
        let limits = Limits { pages: 2, longest: 129, ..LIMITS };
        let mut scheduler = Scheduler::new(decoder, limits).unwrap();
        // Two pages hold 128 tokens; the last new one needs no room.
        let error = scheduler.submit(request(120, 10, 0)).unwrap_err();
        assert!(error.message().contains("does not fit the cache"), "{error}");
        assert!(scheduler.submit(request(0, 1, 0)).is_err());
        assert!(scheduler.submit(request(1, 0, 0)).is_err());
        scheduler.submit(request(120, 9, 0)).unwrap();
        scheduler.submit(request(2, 2, 0)).unwrap();
        scheduler.step().unwrap();
        assert_eq!((scheduler.running(), scheduler.unfinished()), (1, 2));
        while scheduler.unfinished() > 0 {
            scheduler.step().unwrap();
        }
        // A token without an embedding is an error and no panic.
        scheduler.submit(Request { prompt: vec![4096], ..request(1, 1, 0) }).unwrap();
        let error = scheduler.step().unwrap_err();
        assert!(error.message().contains("token 4096"), "{error}");
    });
}

/// Steps whose logits are asked for are issued kernel by kernel, those of greedy decoding are recorded and replayed.
#[test]
fn replayed_steps_choose_the_tokens_of_issued_ones() {
    let Some(cuda) = device("replayed_steps_choose_the_tokens_of_issued_ones") else { return };
    let source = hub::tiny_llama().unwrap();
    for bits in [4, 16] {
        let mut model = Runnable::source(&cuda, &source, &Silent).unwrap();
        model.kv = KvFormat { bits, rotate: bits < 16, ..KvFormat::FULL };
        let decoder = Decoder::load(model, &Silent).unwrap();
        // Two that end early, so that records of three shapes follow one another, and a newcomer.
        let requests = [(3, 40), (90, 40), (17, 12), (64, 30), (5, 40), (9, 25)]
            .map(|(prompt, most_new)| request(prompt, most_new, 0));
        let issued = requests.clone().map(|own| Request { scored: vec![1], ..own });
        let limits = Limits { batch: 5, ..LIMITS };
        let tokens = |requests: &[Request]| -> Vec<Vec<u32>> {
            let made = run(&decoder, limits, requests);
            made.into_iter().map(|own| own.into_iter().map(|(token, _)| token).collect()).collect()
        };
        assert_eq!(tokens(&requests), tokens(&issued));
    }
}
