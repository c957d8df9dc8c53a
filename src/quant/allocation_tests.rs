//! Allocation compared with trying everything, and on instances of a real size.

use super::*;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % limit
    }

    fn sites(&mut self, count: usize, choices: u64) -> Vec<Vec<Choice>> {
        (0..count)
            .map(|_| {
                (0..1 + self.below(choices))
                    .map(|_| Choice { bits: self.below(40), cost: self.below(1000) as f64 / 100.0 })
                    .collect()
            })
            .collect()
    }
}

/// The least cost within the budget by trying everything.
fn brute_force(sites: &[Vec<Choice>], budget: u64) -> Option<f64> {
    let Some((site, rest)) = sites.split_first() else { return Some(0.0) };
    site.iter()
        .filter(|choice| choice.bits <= budget)
        .filter_map(|choice| Some(choice.cost + brute_force(rest, budget - choice.bits)?))
        .min_by(f64::total_cmp)
}

#[test]
fn parts_are_combined_as_by_trying_everything() {
    let mut random = Random(11);
    for _ in 0..300 {
        let count = random.below(5) as usize;
        let parts = random.sites(count, 5);
        let found = combined(&parts);
        for pair in found.windows(2) {
            assert!(pair[0].0.bits < pair[1].0.bits && pair[0].0.cost > pair[1].0.cost);
        }
        for (sum, chosen) in &found {
            let all = chosen.iter().zip(&parts).map(|(at, part)| part[*at]);
            assert_eq!(all.clone().map(|choice| choice.bits).sum::<u64>(), sum.bits);
            assert_eq!(all.fold(0.0, |sum, choice| sum + choice.cost), sum.cost);
        }
        for budget in 0..40 * count as u64 {
            let best = found.iter().rfind(|(sum, _)| sum.bits <= budget);
            let least = brute_force(&parts, budget);
            match (best, least) {
                (Some((sum, _)), Some(least)) => assert!((sum.cost - least).abs() < 1e-9),
                (None, None) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn the_linears_of_many_experts_are_combined_at_once() {
    let mut random = Random(5);
    let mut linear = || {
        let cost = random.below(1000) as f64;
        let widths = [(3, 60.0), (4, 20.0), (8, 1.0), (16, 0.0)];
        widths.map(|(bits, share)| Choice { bits, cost: cost * share }).to_vec()
    };
    let parts: Vec<Vec<Choice>> = (0..256).map(|_| linear()).collect();
    let found = combined(&parts);
    assert!(found.len() <= 256 * 13 + 1, "{}", found.len());
    assert_eq!(found[0].1, [0; 256]);
    assert_eq!(found[found.len() - 1].0.cost, 0.0);
}

#[test]
fn small_instances_are_solved_as_by_trying_everything() {
    let mut random = Random(7);
    let (mut solved, mut refused) = (0, 0);
    for _ in 0..2000 {
        let count = 1 + random.below(5) as usize;
        let sites = random.sites(count, 6);
        let budget = random.below(30 * count as u64);
        match (allocate(&sites, budget), brute_force(&sites, budget)) {
            (Ok(found), Some(least)) => {
                solved += 1;
                assert!((found.cost - least).abs() < 1e-9, "{} {least}", found.cost);
                assert_eq!(found.bound, found.cost);
                let chosen = found.chosen.iter().zip(&sites).map(|(at, site)| site[*at]);
                assert_eq!(chosen.clone().map(|choice| choice.bits).sum::<u64>(), found.bits);
                assert!(found.bits <= budget);
                let cost: f64 = chosen.map(|choice| choice.cost).sum();
                assert!((cost - found.cost).abs() < 1e-9);
            }
            (Err(least), None) => {
                refused += 1;
                assert!(least > budget && brute_force(&sites, least).is_some());
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(solved > 500 && refused > 100, "{solved} {refused}");
}

/// Sites of a network of 80 blocks, widths 2, 3, 4, 8 and 16 and four outlier counts, with costs
/// that fall by about a factor of 4 a bit.
fn large() -> Vec<Vec<Choice>> {
    let mut random = Random(3);
    let mut sites = Vec::new();
    for _ in 0..80 {
        for linears in [3_u32, 1, 2, 1] {
            let weights: Vec<u64> = (0..linears).map(|_| 1 + random.below(3)).collect();
            let costs: Vec<f64> = (0..linears).map(|_| 1.0 + random.below(999) as f64).collect();
            let outliers = 1.0 + random.below(999) as f64;
            let mut choices = Vec::new();
            for count in 0..4_u32 {
                for widths in 0..5_u32.pow(linears) {
                    let mut bits = u64::from(count) * 37_000;
                    let mut cost = outliers / f64::from(1 + count);
                    for linear in 0..linears {
                        let width = [2, 3, 4, 8, 16][(widths / 5_u32.pow(linear) % 5) as usize];
                        bits += weights[linear as usize] * width * 8_388_608;
                        cost += costs[linear as usize] * 0.25_f64.powi(width as i32)
                            / f64::from(1 + count);
                    }
                    choices.push(Choice { bits, cost });
                }
            }
            sites.push(choices);
        }
    }
    sites
}

#[test]
fn large_instances_are_solved_in_moments_and_more_bits_never_cost_more() {
    let sites = large();
    let weights: u64 =
        sites.iter().map(|site| site.iter().map(|choice| choice.bits).min().unwrap_or(0) / 2).sum();
    let mut last = f64::INFINITY;
    for tenths in [20, 22, 25, 30, 35, 40, 43, 45, 50, 60, 80, 120, 200] {
        let budget = weights * tenths / 10;
        let found = allocate(&sites, budget).unwrap();
        assert!(found.bits <= budget);
        assert!(found.bound <= found.cost && found.cost <= last);
        // A ten thousandth at most is left open.
        assert!(found.cost - found.bound <= 1e-4 * found.cost, "{tenths}: {found:?}");
        last = found.cost;
    }
}

#[test]
fn equal_choices_give_the_first() {
    let choice = |bits, cost| Choice { bits, cost };
    let sites = vec![vec![choice(8, 1.0), choice(4, 2.0), choice(4, 2.0), choice(9, 1.0)]; 2];
    assert_eq!(allocate(&sites, 16).unwrap().chosen, [0, 0]);
    assert_eq!(allocate(&sites, 8).unwrap().chosen, [1, 1]);
    assert_eq!(allocate(&sites, 7), Err(8));
}
