/*! Channel order of a site: which channels share a group, and which are outliers.

Atom, section 4.1; outlier.py of the reference. Channels are sorted by ascending calibrated energy
(the diagonal of GPTQ's Hessian), so that a group holds channels of like magnitude, and the last
`outliers` of them become the outlier block. */

/// The order of `energy.len()` channels: padding (-1) first, so that the groups before the outlier
/// block are full, then ascending energy. Padding goes to the weakest channels because a zero is
/// the weakest of all. Channels of equal energy keep the source's order.
///
/// Without `by_energy` the order is the source's, and the padding lies at the end of the last group.
pub fn channel_order(
    energy: &[f64],
    by_energy: bool,
    outliers: usize,
    group_size: usize,
) -> Vec<i32> {
    let channels = energy.len();
    let grouped = channels - outliers;
    let padding = grouped.div_ceil(group_size) * group_size - grouped;
    let mut sorted: Vec<i32> = (0..i32::try_from(channels).expect("widths fit i32")).collect();
    if by_energy {
        sorted.sort_by(|&a, &b| energy[a as usize].total_cmp(&energy[b as usize]));
    }
    let padding = std::iter::repeat_n(-1, padding);
    let (normal, last) = sorted.split_at(grouped);
    if by_energy {
        padding.chain(sorted.iter().copied()).collect()
    } else {
        normal.iter().copied().chain(padding).chain(last.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_come_last_and_padding_first() {
        let energy = [5.0, 1.0, 9.0, 0.5, 7.0, 2.0];
        assert_eq!(channel_order(&energy, true, 2, 3), [-1, -1, 3, 1, 5, 0, 4, 2]);
        assert_eq!(channel_order(&energy, true, 0, 3), [3, 1, 5, 0, 4, 2]);
        assert_eq!(channel_order(&energy, false, 2, 3), [0, 1, 2, 3, -1, -1, 4, 5]);
    }

    #[test]
    fn equal_energies_keep_the_sources_order() {
        assert_eq!(channel_order(&[1.0; 5], true, 1, 2), [0, 1, 2, 3, 4]);
    }
}
