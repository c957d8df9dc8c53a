/*! Bit allocation: one choice for every site, so that the sum of costs is least within a budget of bits.

This is the multiple-choice knapsack problem. A multiplier λ on the bits gives a lower bound of every
allocation's cost,

```text
L(λ) = sum_i min_j (cost_ij + λ bits_ij) - λ budget,
```

which is best at the slope where the steps along the sites' convex hulls, steepest first, use up the
budget (the linear relaxation; Sinha and Zoltners, 1979). Those steps are an allocation already. The rest is
a small search. The excess of a choice is `cost_ij + λ bits_ij` minus the site's minimum. An allocation whose
excesses add up to more than the gap between the best known cost and the bound cannot be better. So most sites
have one or two choices left, and a dynamic programme over sites solves the rest; its states, `(bits, cost)`, are
pruned by dominance and by that gap (Pisinger's reduction, 1995). Where too many states are left, those of the
greatest excess are dropped, and the least of these excesses bounds the loss: the result reports how far from
the optimum it can be, which is nearly always 0. */

/// One way to treat a site.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Bits it takes.
    pub bits: u64,
    /// Loss of accuracy; finite and not negative.
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
    /// No allocation within the budget costs less. Equal to `cost` where the optimum was proven.
    pub bound: f64,
}

/// The undominated combinations of one choice of each part, by ascending bits and descending cost, with the number
/// of each part's choice.
pub fn combined(parts: &[Vec<Choice>]) -> Vec<(Choice, Vec<usize>)> {
    let mut states = vec![Choice { bits: 0, cost: 0.0 }];
    // For every state after a part: the state before it and the part's choice.
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

/// States per site in each pass: few at first, since each pass narrows the gap for the next.
const STATES: [usize; 3] = [64, 1024, 16384];

/// The allocation of least cost within `budget` bits, one of each site's choices, or the best that the
/// search found, with its bound. Results depend on the arguments only.
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

/// An undominated choice of its site.
#[derive(Clone, Copy)]
struct Candidate {
    bits: u64,
    cost: f64,
    /// Its number among the site's choices.
    index: usize,
}

/// The choices that no other one dominates, by ascending bits and descending cost.
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
    /// `cost + λ bits` minus the least possible sum up to this site.
    excess: f64,
    /// The index of its predecessor among the states of the site before.
    from: u32,
    /// The choice at this site.
    choice: u32,
}

/// The dynamic programme. It finds the best allocation that costs less than `known` among those whose partial
/// states are among the `most` of least excess at every site.
fn search(
    sites: &[Vec<Candidate>],
    budget: u64,
    slope: f64,
    lower: f64,
    known: f64,
    most: usize,
) -> Found {
    let gap = known - lower;
    // Excesses are sums of rounded numbers: rounding must not prune a state at the edge.
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
    // Only a dropped state could lead to a better allocation than the best of these.
    Found { better, bound: lower + missed }
}

#[cfg(test)]
#[path = "allocation_tests.rs"]
mod tests;
