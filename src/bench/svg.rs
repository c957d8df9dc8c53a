/*! Pictures: lines through points in a frame, as SVG text without anything else. */

/// Points joined by a line.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// `(x, y)`, in the order in which they are joined.
    pub points: Vec<(f64, f64)>,
}

impl Series {
    /// Points with the names of their lines, as lines in the order in which these are first named.
    pub fn by_name(points: impl Iterator<Item = (String, (f64, f64))>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for (name, point) in points {
            match all.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push(point),
                None => all.push(Self { name, points: vec![point] }),
            }
        }
        all
    }
}

/// A picture of one frame and its legend.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Above the frame.
    pub title: String,
    /// Below it.
    pub x_title: String,
    /// Beside it.
    pub y_title: String,
    /// Whether doubling x is always the same distance; x is then positive.
    pub doubling_x: bool,
    /// A dashed line at a height, and what it says.
    pub mark: Option<(f64, String)>,
    /// One line each. The y axis begins at 0.
    pub series: Vec<Series>,
}

/// The frame's edges, and the widths around it.
const LEFT: f64 = 64.0;
const TOP: f64 = 40.0;
const WIDTH: f64 = 620.0;
const HEIGHT: f64 = 360.0;
const BELOW: f64 = 56.0;
const LEGEND_LINE: f64 = 20.0;
const LETTER: f64 = 7.5;

/// Told apart by everyone, on paper as well; when all are used, lines are dashed.
const COLOURS: [&str; 7] =
    ["#0a5fb4", "#8a5a00", "#2e7d32", "#b0305c", "#5e4fa2", "#00838f", "#666666"];
const DASHES: [&str; 3] = ["", " stroke-dasharray=\"7 4\"", " stroke-dasharray=\"2 3\""];

impl Chart {
    /// The picture as a complete file.
    pub fn svg(&self) -> String {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x_of = |x: f64| if self.doubling_x { x.log2() } else { x };
        let low = points().map(|(x, _)| x_of(*x)).fold(f64::INFINITY, f64::min);
        let high = points().map(|(x, _)| x_of(*x)).fold(f64::NEG_INFINITY, f64::max);
        let low = if low.is_finite() { low } else { 0.0 };
        let high = if high > low { high } else { low + 1.0 };
        let tallest = points().map(|(_, y)| *y).fold(0.0, f64::max);
        let highest = tallest.max(self.mark.as_ref().map_or(0.0, |mark| mark.0));
        // A little more, so that nothing lies on the frame.
        let steps = ticks(1.05 * highest);
        let top = steps.last().copied().unwrap_or(1.0);
        let across = |x: f64| LEFT + WIDTH * (x_of(x) - low) / (high - low);
        let up = |y: f64| TOP + HEIGHT * (1.0 - y / top);

        let names = self.series.iter().map(|series| series.name.chars().count());
        let legend = LETTER * names.max().unwrap_or(0) as f64 + 60.0;
        let (width, height) = (LEFT + WIDTH + legend, TOP + HEIGHT + BELOW);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\">\
             <style>text {{ font: 13px sans-serif; fill: #222 }}</style>\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let (middle, right, bottom) = (LEFT + WIDTH / 2.0, LEFT + WIDTH, TOP + HEIGHT);
        for &y in &steps {
            let height = up(y);
            line(&mut svg, (LEFT, height), (right, height), "#eee", "");
            text(&mut svg, (LEFT - 6.0, height + 4.0), "end", "", &short(y));
        }
        for x in self.x_ticks(low, high) {
            let at = across(x);
            line(&mut svg, (at, TOP), (at, bottom), "#eee", "");
            text(&mut svg, (at, bottom + 18.0), "middle", "", &short(x));
        }
        svg.push_str(&format!(
            "<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"none\" stroke=\"#999\"/>\n"
        ));
        text(&mut svg, (middle, 26.0), "middle", " font-weight=\"bold\"", &self.title);
        text(&mut svg, (middle, bottom + 40.0), "middle", "", &self.x_title);
        let rotated = format!(" transform=\"rotate(-90 18 {:.1})\"", TOP + HEIGHT / 2.0);
        text(&mut svg, (18.0, TOP + HEIGHT / 2.0), "middle", &rotated, &self.y_title);
        if let Some((y, what)) = &self.mark {
            let height = up(*y);
            line(&mut svg, (LEFT, height), (right, height), "#444", " stroke-dasharray=\"5 4\"");
            text(&mut svg, (right - 6.0, height - 5.0), "end", "", what);
        }
        for (index, series) in self.series.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let dash = DASHES[index / COLOURS.len() % DASHES.len()];
            let positions = series.points.iter().map(|(x, y)| (across(*x), up(*y)));
            let joined: Vec<String> =
                positions.clone().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            svg.push_str(&format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>\n",
                joined.join(" ")
            ));
            for (x, y) in positions {
                svg.push_str(&format!(
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>\n"
                ));
            }
            let height = TOP + 12.0 + LEGEND_LINE * index as f64;
            let dash = format!(" stroke-width=\"2\"{dash}");
            line(&mut svg, (right + 14.0, height), (right + 42.0, height), colour, &dash);
            text(&mut svg, (right + 48.0, height + 4.0), "start", "", &series.name);
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// Where the x axis has a number; `low` and `high` are logarithms where doublings are even.
    fn x_ticks(&self, low: f64, high: f64) -> Vec<f64> {
        if !self.doubling_x {
            return ticks(high).into_iter().filter(|x| (low..=high).contains(x)).collect();
        }
        let step = ((high - low) / 16.0).ceil().max(1.0) as i32;
        let all = low.ceil() as i32..=high.floor() as i32;
        all.step_by(step as usize).map(|power| 2f64.powi(power)).collect()
    }
}

/// Round numbers from 0 to `highest` or just beyond it, ten steps at most.
fn ticks(highest: f64) -> Vec<f64> {
    if !(highest > 0.0 && highest.is_finite()) {
        return vec![0.0, 1.0];
    }
    let unit = 10f64.powf((highest / 10.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * unit);
    let step = steps.into_iter().find(|step| highest / step <= 10.0).unwrap_or(highest);
    (0..=(highest / step).ceil() as usize).map(|count| count as f64 * step).collect()
}

/// A number without digits that say nothing.
fn short(number: f64) -> String {
    let digits = format!("{number:.6}");
    digits.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str, more: &str) {
    svg.push_str(&format!(
        "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"{more}/>\n",
        from.0, to.0, from.1, to.1
    ));
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, more: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    svg.push_str(&format!(
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{more}>{words}</text>\n"
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(series: Vec<Series>) -> Chart {
        Chart {
            title: "a < b & c".into(),
            x_title: "tokens".into(),
            y_title: "times as fast".into(),
            doubling_x: true,
            mark: Some((1.0, "as fast".into())),
            series,
        }
    }

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.into(), points: points.to_vec() }
    }

    /// Every element is closed in its turn, and no text holds a bare `&` or `<`.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        for part in svg.split('<').skip(1) {
            let (tag, text) = part.split_once('>').expect("a tag that ends");
            for after in text.split('&').skip(1) {
                assert!(
                    ["amp;", "lt;", "gt;"].iter().any(|name| after.starts_with(name)),
                    "{text}"
                );
            }
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{svg}");
            } else {
                assert!(tag.matches('"').count().is_multiple_of(2), "{tag}");
                if !tag.ends_with('/') {
                    open.push(tag.split(' ').next().unwrap());
                }
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn a_chart_has_a_line_for_each_series_and_is_well_formed() {
        let lines: Vec<Series> = (0..16)
            .map(|at| series(&format!("m{at} gate+up"), &[(1.0, 3.0), (64.0, 2.5), (8192.0, 1.5)]))
            .collect();
        let svg = chart(lines).svg();
        assert_well_formed(&svg);
        assert_eq!(svg.matches("<polyline").count(), 16);
        assert_eq!(svg.matches("<circle").count(), 48);
        assert!(svg.contains("a &lt; b &amp; c") && svg.contains(">8192</text>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        // From the frame's left edge to its right, the middle in proportion to the doublings.
        assert!(svg.contains("points=\"64.0,"), "{svg}");
        assert!(svg.contains(" 350.2,") && svg.contains(" 684.0,"), "{svg}");
    }

    #[test]
    fn a_chart_of_nothing_or_of_one_point_is_a_chart() {
        for series in [vec![], vec![series("one", &[(16.0, 2.0)])], vec![series("none", &[])]] {
            let mut chart = chart(series);
            for doubling in [true, false] {
                chart.doubling_x = doubling;
                let svg = chart.svg();
                assert_well_formed(&svg);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            }
        }
    }

    #[test]
    fn ticks_are_round_and_reach_the_highest_point() {
        assert_eq!(ticks(4.3), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]);
        assert_eq!(ticks(1.0).len(), 11);
        assert_eq!(ticks(0.0), [0.0, 1.0]);
        assert_eq!(
            (short(0.5), short(8192.0), short(10.0)),
            ("0.5".into(), "8192".into(), "10".into())
        );
    }
}
