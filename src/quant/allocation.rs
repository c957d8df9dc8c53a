/*! Bit allocation: one choice for every site, so that the sum of costs is least within a budget of bits.

This is the multiple-choice knapsack problem. A multiplier λ on the bits gives a lower bound of every
allocation's cost,

```text
L(λ) = sum_i min_j (cost_ij + λ bits_ij) - λ budget,
```

which is best at the slope where the steps along the sites' convex hulls, steepest first, use up the
budget (the linear relaxation; Sinha and Zoltners, 1979). Those steps are an allocation already. What is left
is a small search: a choice costs `cost_ij + λ bits_ij` less the site's minimum above the bound, and an
allocation in which these excesses add up to more than the gap between the best known and the bound cannot
be better. So most sites keep one or two choices, and the rest is a dynamic programme over sites whose
states, `(bits, cost)`, are pruned by dominance and by that gap (Pisinger's reduction, 1995). Where states are
still too many, those of the greatest excess are put aside, and the least of them bounds what was missed:
the result says how far from the optimum it can be, which is nearly always 0. */

/// One way to treat a site.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Bits it takes.
    pub bits: u64,
    /// What it costs in accuracy; finite and not negative.
    pub cost: f64,
}

/// A choice for every site.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// The number of each site's choice.
    pub chosen: Vec<usize>,
    /// Sum of their bits, at most the budget.
    pub bits: u64,
    /// Sum of their costs.
    pub cost: f64,
    /// No allocation within the budget costs less: `cost` itself where it was found to be the least.
    pub bound: f64,
}

/// The ways to treat several parts together, one choice of each, without those that another makes pointless: by
/// ascending bits and descending cost, with the number of each part's choice.
pub fn combined(parts: &[Vec<Choice>]) -> Vec<(Choice, Vec<usize>)> {
    let mut states = vec![Choice { bits: 0, cost: 0.0 }];
    // Of every state after a part, the state before it and the part's choice.
    let mut steps: Vec<Vec<(usize, usize)>> = Vec::new();
    for choices in parts {
        let pair = |at: usize| (at % states.len(), at / states.len());
        let all: Vec<Choice> = (0..choices.len() * states.len())
            .map(|at| {
                let (one, other) = (states[pair(at).0], choices[pair(at).1]);
                Choice { bits: one.bits + other.bits, cost: one.cost + other.cost }
            })
            .collect();
        let kept = undominated(&all);
        steps.push(kept.iter().map(|state| pair(state.index)).collect());
        states = kept.iter().map(|state| all[state.index]).collect();
    }
    let chosen = |mut state: usize| {
        let mut chosen = vec![0; parts.len()];
        for (choice, step) in chosen.iter_mut().zip(&steps).rev() {
            (state, *choice) = step[state];
        }
        chosen
    };
    states.iter().enumerate().map(|(at, state)| (*state, chosen(at))).collect()
}

/// States that are kept from site to site: few at first, since each pass narrows the gap for the next.
const STATES: [usize; 3] = [64, 1024, 16384];

/// The allocation of least cost within `budget` bits, one of each site's choices, or as good as the
/// search could prove. Results depend on nothing but the numbers.
///
/// # Errors
/// The bits of the smallest allocation, if these are more than the budget.
pub fn allocate(sites: &[Vec<Choice>], budget: u64) -> Result<Allocation, u64> {
    let sites: Vec<Vec<Candidate>> = sites.iter().map(|choices| undominated(choices)).collect();
    let least: u64 = sites.iter().map(|site| site[0].bits).sum();
    if least > budget {
        return Err(least);
    }
    let relaxed = relax(&sites, budget);
    let mut best = relaxed.chosen;
    let mut cost = total(&sites, &best).1;
    let mut bound = relaxed.bound.min(cost);
    for states in STATES {
        let found = search(&sites, budget, relaxed.slope, relaxed.bound, cost, states);
        if let Some(better) = found.better {
            (best, cost) = (better.0, better.1);
        }
        bound = found.bound.min(cost).max(bound);
        if bound >= cost {
            break;
        }
    }
    let bits = total(&sites, &best).0;
    let chosen = sites.iter().zip(&best).map(|(site, at)| site[*at].index).collect();
    Ok(Allocation { chosen, bits, cost, bound: bound.min(cost) })
}

/// A choice that no other of its site makes pointless.
#[derive(Clone, Copy)]
struct Candidate {
    bits: u64,
    cost: f64,
    /// Its number among the site's choices.
    index: usize,
}

/// Choices by ascending bits and descending cost: those than which none is both smaller and better.
fn undominated(choices: &[Choice]) -> Vec<Candidate> {
    let mut all: Vec<Candidate> = choices
        .iter()
        .enumerate()
        .map(|(index, choice)| Candidate { bits: choice.bits, cost: choice.cost, index })
        .collect();
    // A stable sort: of equal choices the first is kept.
    all.sort_by(|a, b| a.bits.cmp(&b.bits).then(a.cost.total_cmp(&b.cost)));
    let mut kept: Vec<Candidate> = Vec::new();
    for candidate in all {
        if kept.last().is_none_or(|last| candidate.cost < last.cost) {
            kept.push(candidate);
        }
    }
    kept
}

/// Bits and cost of the choices `chosen`.
fn total(sites: &[Vec<Candidate>], chosen: &[usize]) -> (u64, f64) {
    sites
        .iter()
        .zip(chosen)
        .fold((0, 0.0), |(bits, cost), (site, at)| (bits + site[*at].bits, cost + site[*at].cost))
}

struct Relaxed {
    /// λ: cost that a bit saves where the budget ends.
    slope: f64,
    /// L(λ).
    bound: f64,
    /// An allocation along the hulls.
    chosen: Vec<usize>,
}

/// Steps along the sites' lower convex hulls, steepest first, as far as the budget goes.
fn relax(sites: &[Vec<Candidate>], budget: u64) -> Relaxed {
    struct Step {
        slope: f64,
        site: usize,
        to: usize,
    }
    let mut steps = Vec::new();
    for (site, candidates) in sites.iter().enumerate() {
        let hull = hull(candidates);
        steps.extend(hull.windows(2).map(|pair| Step {
            slope: saved_per_bit(&candidates[pair[0]], &candidates[pair[1]]),
            site,
            to: pair[1],
        }));
    }
    // Slopes fall along a hull, and the sort is stable: a site's steps stay in order.
    steps.sort_by(|a, b| b.slope.total_cmp(&a.slope));
    let mut chosen = vec![0; sites.len()];
    let mut ended = vec![false; sites.len()];
    let mut bits: u64 = sites.iter().map(|site| site[0].bits).sum();
    let mut slope = None;
    for Step { slope: own, site, to } in steps {
        let grown = bits - sites[site][chosen[site]].bits + sites[site][to].bits;
        if grown <= budget && !ended[site] {
            (bits, chosen[site]) = (grown, to);
        } else {
            ended[site] = true;
            slope.get_or_insert(own);
        }
    }
    let slope = slope.unwrap_or(0.0);
    let excesses = sites.iter().map(|site| least_charged(site, slope));
    Relaxed { slope, bound: excesses.sum::<f64>() - slope * budget as f64, chosen }
}

fn saved_per_bit(from: &Candidate, to: &Candidate) -> f64 {
    (from.cost - to.cost) / (to.bits - from.bits) as f64
}

/// `min_j (cost_j + λ bits_j)`.
fn least_charged(site: &[Candidate], slope: f64) -> f64 {
    site.iter()
        .map(|candidate| candidate.cost + slope * candidate.bits as f64)
        .fold(f64::INFINITY, f64::min)
}

/// The corners of a site's lower convex hull, bits ascending.
fn hull(site: &[Candidate]) -> Vec<usize> {
    let mut hull: Vec<usize> = Vec::new();
    for at in 0..site.len() {
        while let [.., before, last] = hull[..] {
            if saved_per_bit(&site[before], &site[last]) > saved_per_bit(&site[last], &site[at]) {
                break;
            }
            hull.pop();
        }
        hull.push(at);
    }
    hull
}

struct Found {
    /// Choices and cost, if less than was known.
    better: Option<(Vec<usize>, f64)>,
    /// No allocation costs less than this or the best known.
    bound: f64,
}

/// A partial allocation.
#[derive(Clone, Copy)]
struct State {
    bits: u64,
    cost: f64,
    /// `cost + λ bits` above the least that was possible so far.
    excess: f64,
    /// Its predecessor among the states of the site before, and its choice.
    from: u32,
    choice: u32,
}

/// The dynamic programme. Finds every allocation better than `known` whose partial states were among
/// the `most` of least excess at every site.
fn search(
    sites: &[Vec<Candidate>],
    budget: u64,
    slope: f64,
    lower: f64,
    known: f64,
    most: usize,
) -> Found {
    let gap = known - lower;
    // Excesses are sums of rounded numbers: what is at the edge by rounding must not be lost.
    let slack = 1e-9 * (known.abs() + slope * budget as f64);
    let mut left: u64 = sites.iter().map(|site| site[0].bits).sum();
    let mut states = vec![State { bits: 0, cost: 0.0, excess: 0.0, from: 0, choice: 0 }];
    let mut trail: Vec<Vec<(u32, u32)>> = Vec::with_capacity(sites.len());
    let mut missed = f64::INFINITY;
    for site in sites {
        left -= site[0].bits;
        let least = least_charged(site, slope);
        let mut next = Vec::new();
        for (choice, candidate) in (0..).zip(site) {
            let own = candidate.cost + slope * candidate.bits as f64 - least;
            if own > gap + slack {
                continue;
            }
            for (from, state) in (0..).zip(&states) {
                let bits = state.bits + candidate.bits;
                let excess = state.excess + own;
                if excess <= gap + slack && bits + left <= budget {
                    let cost = state.cost + candidate.cost;
                    next.push(State { bits, cost, excess, from, choice });
                }
            }
        }
        next.sort_unstable_by(|a, b| {
            let by_size = a.bits.cmp(&b.bits).then(a.cost.total_cmp(&b.cost));
            by_size.then((a.from, a.choice).cmp(&(b.from, b.choice)))
        });
        let mut least_cost = f64::INFINITY;
        next.retain(|state| {
            let kept = state.cost < least_cost;
            least_cost = least_cost.min(state.cost);
            kept
        });
        if next.len() > most {
            next.sort_by(|a, b| a.excess.total_cmp(&b.excess));
            missed = missed.min(next[most].excess);
            next.truncate(most);
        }
        trail.push(next.iter().map(|state| (state.from, state.choice)).collect());
        states = next;
    }
    let best = (0..states.len()).min_by(|a, b| states[*a].cost.total_cmp(&states[*b].cost));
    let better = best.filter(|at| states[*at].cost < known).map(|last| {
        let mut at = last;
        let mut chosen = vec![0; sites.len()];
        for (site, steps) in trail.iter().enumerate().rev() {
            let (from, choice) = steps[at];
            chosen[site] = choice as usize;
            at = from as usize;
        }
        let cost = total(sites, &chosen).1;
        (chosen, cost)
    });
    // Nothing but what was put aside can be better than the best of these.
    Found { better, bound: lower + missed }
}

#[cfg(test)]
mod tests {
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
                        .map(|_| Choice {
                            bits: self.below(40),
                            cost: self.below(1000) as f64 / 100.0,
                        })
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
                let costs: Vec<f64> =
                    (0..linears).map(|_| 1.0 + random.below(999) as f64).collect();
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
        let weights: u64 = sites
            .iter()
            .map(|site| site.iter().map(|choice| choice.bits).min().unwrap_or(0) / 2)
            .sum();
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
}
