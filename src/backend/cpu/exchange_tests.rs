use super::*;
use crate::backend::Calibration;
use crate::ranks::thread_ranks;

/// What is sent is received, also where it takes several pieces.
#[test]
fn matrices_reach_another_rank() {
    for n in [1, 7, 1500] {
        let value = |at: usize| (at % 977) as f32 - 0.5;
        let mut cpus = thread_ranks(2).into_iter().map(|rank| {
            let mut cpu = Cpu::new().unwrap();
            cpu.join(Arc::new(rank)).unwrap();
            cpu
        });
        let (sender, receiver) = (cpus.next().unwrap(), cpus.next().unwrap());
        let (gram, cross) = std::thread::scope(|scope| {
            scope.spawn(move || {
                let lower = (0..n * n).map(value).collect();
                sender.send_gram(1, &Hessian { n, lower }).unwrap();
                let data = (0..3 * n).map(value).collect();
                sender.send_cross_covariance(1, &Matrix { rows: 3, columns: n, data }).unwrap();
            });
            let mut gram = receiver.gram(n).unwrap();
            receiver.receive_gram(0, &mut gram).unwrap();
            let mut cross = receiver.cross_covariance(3, n).unwrap();
            receiver.receive_cross_covariance(0, &mut cross).unwrap();
            (gram, cross)
        });
        for at in 0..n * n {
            let expected = if at % n <= at / n { value(at) } else { 0.0 };
            assert_eq!(gram.lower[at], expected, "{at} of {n}");
        }
        assert!(cross.data.iter().enumerate().all(|(at, got)| *got == value(at)));
    }
}

#[test]
fn gram_matrices_and_cross_covariances_are_added() {
    let cpu = Cpu::new().unwrap();
    let n = 3;
    let gram = |factor: f32| Hessian { n, lower: (0..9).map(|at| factor * at as f32).collect() };
    let mut sum = gram(1.0);
    cpu.join_gram(&mut sum, &gram(10.0)).unwrap();
    // What is above the diagonal belongs to no rank.
    assert_eq!(sum.lower, [0.0, 1.0, 2.0, 33.0, 44.0, 5.0, 66.0, 77.0, 88.0]);
    let cross = |factor: f32| Matrix { rows: 1, columns: 2, data: vec![factor, 2.0 * factor] };
    let mut sum = cross(1.0);
    cpu.join_cross_covariance(&mut sum, &cross(10.0)).unwrap();
    assert_eq!(sum.data, [11.0, 22.0]);
}
