/*! Linears and their sites: errors, bits and outliers as maps, and the worst of them. */

use super::chart::{Map, distribution};
use super::page::{caption, table, text};
use super::results::{Quantized, Site};
use super::{Page, Shown};
use crate::checkpoint::plan::{LinearPlan, SitePlan};
use crate::units;

/// How many of the worst linears are named.
const WORST: usize = 8;

/// `model.layers.3.self_attn.q_proj` -> `q_proj`.
fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

pub(super) fn sections(page: &mut Page, shown: Option<&Shown>, quantized: Option<&Quantized>) {
    if let Some(shown) = shown {
        page.section("Output errors, bits and outliers", maps(&shown.manifest.blocks));
    }
    let mut linears: Vec<(&str, u8, f64)> = match (shown, quantized) {
        (Some(shown), _) => all(&shown.manifest.blocks)
            .filter_map(|(_, linear)| Some((linear.name.as_str(), linear.bits, linear.error?)))
            .collect(),
        (None, Some(run)) => run
            .linears
            .iter()
            .map(|linear| (linear.name.as_str(), linear.bits, linear.error.unwrap_or(f64::NAN)))
            .collect(),
        (None, None) => Vec::new(),
    };
    // An error that is no number is worse than any.
    let rank = |error: f64| if error.is_nan() { f64::INFINITY } else { error };
    linears.sort_by(|a, b| rank(b.2).total_cmp(&rank(a.2)));
    let rows: Vec<Vec<String>> = linears
        .iter()
        .take(WORST)
        .map(|(name, bits, error)| {
            vec![text(name), bits.to_string(), format!("{:.2} %", 100.0 * error)]
        })
        .collect();
    let headings = [("linear", false), ("bits", true), ("output error", true)];
    let sites = quantized.map(|run| distributions(&run.worst_sites)).unwrap_or_default();
    page.section("Worst linears", table(&headings, &rows) + &sites);
}

fn all(blocks: &[Vec<SitePlan>]) -> impl Iterator<Item = (&SitePlan, &LinearPlan)> {
    blocks.iter().flatten().flat_map(|site| site.linears.iter().map(move |linear| (site, linear)))
}

/// The names that `name` gives to the parts of all blocks, each once, in order.
fn columns<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut columns = Vec::new();
    for name in names {
        if !columns.contains(&name) {
            columns.push(name);
        }
    }
    columns
}

fn maps(blocks: &[Vec<SitePlan>]) -> String {
    let kinds = columns(all(blocks).map(|(_, linear)| last_part(&linear.name)));
    let of_kind = |block: &[SitePlan], kind: &str, choose: &dyn Fn(&LinearPlan) -> Option<f64>| {
        let linears = block.iter().flat_map(|site| &site.linears);
        let values: Vec<f64> =
            linears.filter(|linear| last_part(&linear.name) == kind).filter_map(choose).collect();
        let most = values.iter().copied().reduce(|a, b| if b > a || b.is_nan() { b } else { a })?;
        Some((most, values.len()))
    };
    let map = |heading,
               choose: &dyn Fn(&LinearPlan) -> Option<f64>,
               shown: &dyn Fn(f64) -> String| {
        let cell = |index: usize, block: &[SitePlan], kind: &str| {
            let (value, count) = of_kind(block, kind, choose)?;
            let of = if count > 1 { format!(", the most of {count}") } else { String::new() };
            Some((value, shown(value), format!("block {index}, {kind}: {}{of}", shown(value))))
        };
        let rows = blocks.iter().enumerate();
        let cells = rows
            .map(|(index, block)| kinds.iter().map(|kind| cell(index, block, kind)).collect())
            .collect();
        let columns = kinds.iter().map(|kind| kind.trim_end_matches("_proj").to_owned()).collect();
        Map { heading, columns, cells }.html()
    };
    let mut html =
        map("output error, %", &|linear| linear.error, &|error| format!("{:.2}", 100.0 * error));
    let widths = columns_of(all(blocks).map(|(_, linear)| usize::from(linear.bits)));
    if widths.len() > 1 {
        html += &map("bits", &|linear| Some(linear.bits.into()), &|bits| format!("{bits:.0}"));
    }
    if columns_of(blocks.iter().flatten().map(|site| site.outlier_channels)).len() > 1 {
        html += &outliers(blocks);
    }
    let same = match widths[..] {
        [bits] => format!(" Every linear has {bits} bits."),
        _ => String::new(),
    };
    let words = format!(
        "Rows are blocks. The output error is |(W - Q) x| / |W x| on the calibration windows, x as the quantized blocks before make it; \
         of experts the worst counts.{same}"
    );
    format!("<div class=\"maps\">\n{html}</div>\n{}", caption(&text(&words)))
}

/// The values that occur.
fn columns_of(values: impl Iterator<Item = usize>) -> Vec<usize> {
    let found: std::collections::BTreeSet<usize> = values.collect();
    found.into_iter().collect()
}

fn outliers(blocks: &[Vec<SitePlan>]) -> String {
    let sites = columns(blocks.iter().flatten().map(|site| last_part(&site.name)));
    let cell = |index: usize, block: &[SitePlan], name: &str| {
        let counts = block.iter().filter(|site| last_part(&site.name) == name);
        let most = counts.map(|site| site.outlier_channels).max()?;
        Some((
            most as f64,
            most.to_string(),
            format!("block {index}, {name}: {most} outlier channels"),
        ))
    };
    let rows = blocks.iter().enumerate();
    let cells = rows
        .map(|(index, block)| sites.iter().map(|site| cell(index, block, site)).collect())
        .collect();
    let columns = sites.iter().map(|site| site.replace('_', " ")).collect();
    Map { heading: "outlier channels", columns, cells }.html()
}

/// How large the channels are that the worst linears read.
fn distributions(sites: &[Site]) -> String {
    let values = || sites.iter().flat_map(|site| &site.rms).filter(|value| **value > 0.0);
    let low = values().copied().fold(f64::INFINITY, f64::min).max(1e-4);
    let high = values().copied().fold(0.0, f64::max);
    if high <= low {
        return String::new();
    }
    let tile = |site: &Site| {
        let points: Vec<(f64, f64)> =
            site.shares.iter().copied().zip(site.rms.iter().copied()).collect();
        let share = site.outliers as f64 / site.channels as f64;
        format!(
            "<div><p>{}<br><small>{}</small></p>\n{}</div>\n",
            text(&site.linear),
            text(&format!(
                "{}: {}, {}",
                last_part(&site.site),
                units::counted(site.channels, "channel"),
                units::counted(site.outliers, "outlier")
            )),
            distribution(&points, share, (low, high))
        )
    };
    let tiles: String = sites.iter().map(tile).collect();
    let words = "The activations of the worst linears: root mean square of each channel over the calibration tokens in units of its \
                 site's, channels sorted from left to right. Shaded: as many channels as are outliers.";
    format!(
        "<h3>What they read</h3>\n<div class=\"tiles\">\n{tiles}</div>\n{}",
        caption(&text(words))
    )
}
