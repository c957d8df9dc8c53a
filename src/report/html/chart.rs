/*! Charts as inline SVG and bars. Numbers come in, HTML goes out. */

use super::page::text;

/// A bar after its label and before its value.
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) value: f64,
    /// As it is printed.
    pub(super) shown: String,
    /// Standard error, if it is known.
    pub(super) error: Option<f64>,
    /// The CSS class of its colour: `one` for a source, `two` for a result.
    pub(super) class: &'static str,
}

/// Bars from 0 to the greatest value, or to `most`; errors as whiskers.
pub(super) fn bars(bars: &[Bar], most: Option<f64>) -> String {
    let ends = bars.iter().map(|bar| bar.value + bar.error.unwrap_or(0.0));
    let most = most.unwrap_or_else(|| ends.filter(|end| end.is_finite()).fold(0.0, f64::max));
    if bars.is_empty() || most <= 0.0 {
        return String::new();
    }
    let across = |value: f64| (100.0 * value / most).clamp(0.0, 100.0);
    let row = |bar: &Bar| {
        let Bar { label, value, shown, error, class } = bar;
        let mut shapes = format!(
            "<rect class=\"{class}\" x=\"0\" y=\"2\" width=\"{:.2}\" height=\"12\"/>",
            if value.is_finite() { across(*value) } else { 100.0 }
        );
        if let Some(error) = error.filter(|error| error.is_finite()) {
            let (low, high) = (across(value - error), across(value + error));
            shapes += &format!(
                "<path class=\"whisker\" vector-effect=\"non-scaling-stroke\" fill=\"none\" \
                 d=\"M{low:.2} 8H{high:.2}M{low:.2} 4V12M{high:.2} 4V12\"/>"
            );
        }
        format!(
            "<span class=\"l\">{}</span><svg class=\"track\" viewBox=\"0 0 100 16\" preserveAspectRatio=\"none\" aria-hidden=\"true\">\
             {shapes}</svg><span class=\"n\">{}</span>\n",
            text(label),
            text(shown)
        )
    };
    format!("<div class=\"bars\">\n{}</div>\n", bars.iter().map(row).collect::<String>())
}

/// A map of blocks (downwards) and columns; a cell is none where there is nothing.
pub(super) struct Map<'a> {
    pub(super) heading: &'a str,
    pub(super) columns: Vec<String>,
    /// `[block][column]`: the value that decides the colour, what the cell shows, and what it says in full.
    pub(super) cells: Vec<Vec<Option<(f64, String, String)>>>,
}

const CELL: (usize, usize) = (42, 17);
const MARGIN: (usize, usize) = (26, 16);

impl Map<'_> {
    pub(super) fn html(&self) -> String {
        let values = || self.cells.iter().flatten().flatten().map(|(value, ..)| *value);
        let finite = || values().filter(|value| value.is_finite());
        let (low, high) = (finite().fold(f64::INFINITY, f64::min), finite().fold(0.0, f64::max));
        let (width, height) = CELL;
        let (left, top) = MARGIN;
        let mut svg = String::new();
        for (column, name) in self.columns.iter().enumerate() {
            let x = left + column * width + width / 2;
            svg +=
                &format!("<text x=\"{x}\" y=\"11\" text-anchor=\"middle\">{}</text>\n", text(name));
        }
        for (block, cells) in self.cells.iter().enumerate() {
            let y = top + block * height;
            svg += &format!(
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{block}</text>\n",
                left - 5,
                y + 12
            );
            for (column, cell) in cells.iter().enumerate() {
                let Some((value, shown, full)) = cell else { continue };
                let x = left + column * width;
                // Pale for the least, since a difference is what a map is for; full where it is no number.
                let share = if high > low { (value - low) / (high - low) } else { 0.0 };
                let share = if value.is_finite() { 0.06 + 0.88 * share } else { 1.0 };
                let ink = if share > 0.55 { "hi" } else { "lo" };
                svg += &format!(
                    "<g><title>{}</title><rect class=\"heat\" fill-opacity=\"{share:.3}\" x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\"/>\
                     <text class=\"{ink}\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text></g>\n",
                    text(full),
                    width - 1,
                    height - 1,
                    x + width / 2,
                    y + 12,
                    text(shown)
                );
            }
        }
        let (wide, tall) = (left + self.columns.len() * width, top + self.cells.len() * height);
        let heading = text(self.heading);
        format!(
            "<div><h3>{heading}</h3>\n<svg width=\"{wide}\" height=\"{tall}\" viewBox=\"0 0 {wide} {tall}\" role=\"img\" aria-label=\"{heading}\">\n\
             {svg}</svg></div>\n"
        )
    }
}

/// The distribution of a site's channels: their shares, ascending, across; their root mean squares upwards, on a logarithmic scale
/// from `low` to `high`; the share that are outliers shaded.
pub(super) fn distribution(
    points: &[(f64, f64)],
    outliers: f64,
    (low, high): (f64, f64),
) -> String {
    const WIDTH: f64 = 230.0;
    const HEIGHT: f64 = 90.0;
    const LEFT: f64 = 34.0;
    let span = (high / low).ln();
    let up = |value: f64| HEIGHT - HEIGHT * ((value.max(low) / low).ln() / span).clamp(0.0, 1.0);
    let across = |share: f64| LEFT + (WIDTH - LEFT) * share;
    let mut svg = String::new();
    if outliers > 0.0 {
        let x = across(1.0 - outliers);
        svg += &format!(
            "<rect class=\"out\" x=\"{x:.1}\" y=\"0\" width=\"{:.1}\" height=\"{HEIGHT}\"/>\n",
            WIDTH - x
        );
    }
    let mut mark = 10_f64.powf(low.log10().ceil());
    while mark <= high {
        let y = up(mark);
        svg += &format!(
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{mark}</text>\n",
            LEFT - 4.0,
            (y + 3.5).max(9.0)
        );
        mark *= 10.0;
    }
    let path: Vec<String> = points
        .iter()
        .map(|(share, value)| format!("{:.1} {:.1}", across(*share), up(*value)))
        .collect();
    format!(
        "<svg width=\"{WIDTH}\" height=\"{}\" viewBox=\"0 -2 {WIDTH} {}\" role=\"img\" aria-label=\"channels by size\">\n\
         {svg}<rect class=\"frame\" x=\"{LEFT}\" y=\"0\" width=\"{}\" height=\"{HEIGHT}\"/>\n\
         <path class=\"curve\" d=\"M{}\"/></svg>\n",
        HEIGHT + 4.0,
        HEIGHT + 4.0,
        WIDTH - LEFT,
        path.join("L")
    )
}

/// Lines over the steps of a training, from the least value to the greatest; each with the CSS class of its stroke.
pub(super) fn curves(lines: &[(&str, Vec<(f64, f64)>)], label: &str) -> String {
    const WIDTH: f64 = 640.0;
    const HEIGHT: f64 = 180.0;
    const LEFT: f64 = 52.0;
    let points = || lines.iter().flat_map(|(_, points)| points).filter(|(_, y)| y.is_finite());
    let last = points().map(|(x, _)| *x).fold(0.0, f64::max);
    let low = points().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let high = points().map(|(_, y)| *y).fold(0.0, f64::max);
    if last <= 0.0 || high <= low {
        return String::new();
    }
    let across = |x: f64| LEFT + (WIDTH - LEFT) * x / last;
    // A little room above and below.
    let up = |y: f64| HEIGHT * (0.95 - 0.9 * (y - low) / (high - low));
    let mut svg = String::new();
    for share in [0.0, 0.5, 1.0] {
        let value = low + share * (high - low);
        let (y, x) = (up(value), LEFT - 6.0);
        svg += &format!(
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text x=\"{x:.0}\" y=\"{:.1}\" text-anchor=\"end\">{value:.4}</text>\n",
            y + 3.5
        );
        svg += &format!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{}\">{:.0}</text>\n",
            across(share * last),
            HEIGHT + 14.0,
            if share == 1.0 { "end" } else { "middle" },
            share * last
        );
    }
    for (class, points) in lines {
        let path = points.iter().filter(|(_, y)| y.is_finite());
        let path: Vec<String> =
            path.map(|(x, y)| format!("{:.1} {:.1}", across(*x), up(*y))).collect();
        svg += &format!("<path class=\"curve {class}\" d=\"M{}\"/>\n", path.join("L"));
    }
    let (tall, label) = (HEIGHT + 20.0, text(label));
    format!(
        "<svg width=\"{WIDTH}\" height=\"{tall}\" viewBox=\"0 0 {WIDTH} {tall}\" role=\"img\" aria-label=\"{label}\">\n\
         {svg}<rect class=\"frame\" x=\"{LEFT}\" y=\"0\" width=\"{}\" height=\"{HEIGHT}\"/></svg>\n",
        WIDTH - LEFT
    )
}
