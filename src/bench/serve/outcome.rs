//! What was measured, as rows of figures.

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::super::BenchOutcome;
use super::super::svg::{Chart, Series};
use super::network::RowKind;
use super::timing::Run;

/// The time of a step in which every sequence of a batch gets a token.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StepTime {
    /// Sequences.
    pub batch: usize,
    /// Cached tokens of each, at the first of the timed steps.
    pub context: usize,
    /// Median milliseconds.
    pub ms: f64,
    /// Bytes of weights and cache that the step has to read.
    pub bytes: Option<u64>,
    /// What share of the time a plain read of so many bytes takes.
    pub share_of_floor: Option<f64>,
    /// How many times as fast as the first row at the same batch, if it was timed there.
    pub speedup: Option<f64>,
}

/// A row: a network at a batch.
#[derive(Clone, Debug, Serialize)]
pub struct ServeRow {
    /// Its format.
    pub row: RowKind,
    /// Sequences that run together.
    pub batch: usize,
    /// The run of the median throughput.
    pub run: Run,
    /// Total tokens a second of every run.
    pub all_tokens_per_second: Vec<f64>,
    /// Throughput divided by the first row's of the same list.
    pub speedup: f64,
    /// Most device memory in use.
    pub peak_bytes: Option<u64>,
    /// Device memory of the weights.
    pub weight_bytes: Option<u64>,
    /// Bytes of keys and values of a token.
    pub token_bytes: u64,
}

/// The result of `atom bench serve`. As JSON it is a [`BenchOutcome`].
#[derive(Clone, Debug)]
pub struct ServeOutcome {
    /// The model's name.
    pub shape: String,
    /// Where it ran.
    pub device: String,
    /// The workload's name.
    pub workload: String,
    /// Memory that all had to fit into.
    pub memory_bytes: Option<u64>,
    /// Bytes a second that the device reads.
    pub read_rate: Option<f64>,
    /// Rows at their own batches.
    pub own: Vec<ServeRow>,
    /// Rows at one batch.
    pub equal: Vec<ServeRow>,
    /// Times of single steps, by row.
    pub steps: Vec<(RowKind, Vec<StepTime>)>,
}

impl Serialize for ServeOutcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.outcome().serialize(serializer)
    }
}

impl ServeOutcome {
    /// All figures as rows: of each batch and of each step.
    fn outcome(&self) -> BenchOutcome {
        let named = |figure: &str, value: Value| {
            let mut row = Map::new();
            row.insert("figure".to_owned(), figure.into());
            flatten(&mut row, "", value);
            row
        };
        let value = |row: &ServeRow| serde_json::to_value(row).expect("numbers and names");
        let own = self.own.iter().map(|row| named("own batch", value(row)));
        let equal = self.equal.iter().map(|row| named("equal batch", value(row)));
        let steps = self.steps.iter().flat_map(|(kind, steps)| {
            steps.iter().map(|step| {
                let mut value = serde_json::to_value(step).expect("numbers and names");
                value["row"] = kind.name().into();
                named("step", value)
            })
        });
        let facts = [
            ("shape", json!(self.shape)),
            ("device", json!(self.device)),
            ("workload", json!(self.workload)),
            ("memory_bytes", json!(self.memory_bytes)),
            ("read_bytes_per_second", json!(self.read_rate)),
        ];
        let facts = facts.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        BenchOutcome { rows: own.chain(equal).chain(steps).collect(), facts }
    }

    /// Tokens a second against the batch: of the workload at each row's batches, and of a step of decoding.
    pub fn chart(&self) -> Chart {
        let rows = self.own.iter().chain(&self.equal).map(|row| {
            let point = (row.batch as f64, row.run.total_tokens_per_second);
            (format!("{}, requests", row.row.name()), point)
        });
        let steps = self.steps.iter().flat_map(|(kind, steps)| {
            let name = format!("{}, one step", kind.name());
            let rate = |step: &StepTime| 1e3 * step.batch as f64 / step.ms;
            steps.iter().map(move |step| (name.clone(), (step.batch as f64, rate(step))))
        });
        let mut series = Series::by_name(rows.chain(steps));
        for Series { points, .. } in &mut series {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        Chart {
            title: format!("{} with random weights, workload {}", self.shape, self.workload),
            x_title: "sequences that run together".into(),
            y_title: "tokens a second".into(),
            doubling_x: true,
            mark: None,
            series,
        }
    }

    /// Divides by the first row.
    pub(super) fn compare(&mut self) {
        for rows in [&mut self.own, &mut self.equal] {
            let first = rows.first().map_or(1.0, |row| row.run.total_tokens_per_second);
            rows.iter_mut().for_each(|row| row.speedup = row.run.total_tokens_per_second / first);
        }
        let Some((_, first)) = self.steps.first().cloned() else { return };
        for step in self.steps.iter_mut().flat_map(|(_, steps)| steps) {
            let same = first.iter().find(|own| own.batch == step.batch);
            step.speedup = same.map(|own| own.ms / step.ms);
        }
    }
}

/// Adds the fields of an object to a row, those of objects in it under joined names.
fn flatten(row: &mut Map<String, Value>, name: &str, value: Value) {
    let Value::Object(fields) = value else {
        row.insert(name.to_owned(), value);
        return;
    };
    for (key, value) in fields {
        // A run is what a row is about.
        let joined = match (name, key.as_str()) {
            ("", "run") => String::new(),
            ("", key) => key.to_owned(),
            (name, key) => format!("{name}_{key}"),
        };
        flatten(row, &joined, value);
    }
}
