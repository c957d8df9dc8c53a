/*! What of a checkpoint `Q4_0`, or llama.cpp, does not have. */

use super::blocks::BLOCK;
use super::metadata::{Unsupported, unsupported};
use super::tensors::fills_blocks;
use crate::export::model::Subject;
use crate::export::obstacle::{Obstacle, Obstacles};
use crate::model::sites::SiteKind;
use crate::quant::site::Transform;
use crate::recipe::Order;

/// Every setting in the way.
pub(super) fn of(subject: &Subject<'_>) -> Vec<Obstacle> {
    let mut obstacles = Obstacles::default();
    for Unsupported { setting, found, needed } in unsupported(subject.architecture) {
        obstacles.check(false, setting, "config.json", found, needed);
    }
    for site in subject.sites() {
        let name = &site.name;
        let order = if site.order == Order::None { "none" } else { "energy" };
        obstacles.check(site.order == Order::None, "order", name, order, "none");
        let outliers = site.outlier_channels;
        obstacles.check(outliers == 0, "outliers", name, outliers, 0);
        let is_plain = site.transform == Transform::None;
        obstacles.check(is_plain, "transform", name, "hadamard", "none");
        let quantized = site.linears.iter().filter(|linear| linear.bits < 16);
        for linear in quantized {
            let name = &linear.name;
            let has_type = matches!(linear.bits, 4 | 8);
            obstacles.check(
                has_type,
                "bits",
                name,
                linear.bits,
                "4 (or 8 or 16, linear by linear)",
            );
            let codebook = linear.codebook;
            obstacles.check(codebook.is_int(), "format", name, codebook.name(), "int");
            let fits = site.group_size.is_multiple_of(BLOCK);
            obstacles.check(fits, "group", name, site.group_size, "32 or a multiple of it");
            let columns = site.channels;
            let needed = "a multiple of 32";
            obstacles.check(fills_blocks(columns), "input width", name, columns, needed);
        }
    }
    check_experts(subject, &mut obstacles);
    obstacles.into_vec()
}

/// The experts of a block are one tensor for gate, for up and for down, of one type.
fn check_experts(subject: &Subject<'_>, obstacles: &mut Obstacles) {
    for (index, block) in subject.blocks.iter().enumerate() {
        if subject.architecture.experts_of(index).is_none() {
            continue;
        }
        let sites = subject.architecture.sites(index);
        let of = |kind: SiteKind| {
            let sites = sites.iter().zip(block).filter(move |(site, _)| site.kind == kind);
            sites.flat_map(|(_, plan)| &plan.linears)
        };
        let gate = of(SiteKind::MlpIn).step_by(2);
        let up = of(SiteKind::MlpIn).skip(1).step_by(2);
        let all: [Box<dyn Iterator<Item = _>>; 3] =
            [Box::new(gate), Box::new(up), Box::new(of(SiteKind::MlpAct))];
        for mut linears in all {
            let Some(first) = linears.next() else { continue };
            for linear in linears {
                let fits = linear.bits == first.bits;
                let needed = format!("that of all experts of the block, {}", first.bits);
                obstacles.check(fits, "bits", &linear.name, linear.bits, needed);
            }
        }
    }
}
