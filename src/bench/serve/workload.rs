//! What is served: the lengths of requests, and when each is sent.

use std::path::Path;

use serde::Deserialize;

use crate::{Error, Result};

/// See its first lines for the origin.
const ATOM_LENGTHS: &str = include_str!("atom-lengths.txt");

/// Tokens of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Lengths {
    /// Of its prompt.
    pub prompt: usize,
    /// To produce, whatever they are.
    pub output: usize,
}

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// As many as the batch has sequences at first, then one whenever one ends.
    ClosedLoop,
    /// All at the start.
    AllAtStart,
}

/// Requests in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name.
    pub name: String,
    /// When they are sent.
    pub policy: Policy,
    source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// So many of a list for each sequence of the batch; from its beginning again after its end.
    PerSequence { list: Vec<Lengths>, requests: usize },
    /// The same for each sequence of the batch.
    Wave(Lengths),
    /// These.
    List(Vec<Lengths>),
}

impl Workload {
    /// The workload of a name, or the pairs of a JSON file.
    ///
    /// # Errors
    /// A usage error for an unknown name; input for a file that is no list of `[prompt, output]`.
    pub fn named(name: &str) -> Result<Self> {
        let of = |policy, source| Self { name: name.to_owned(), policy, source };
        Ok(match name {
            // bench_textgen.py of the reference, 20 batches.
            "atom" => {
                let source = Source::PerSequence { list: atom_lengths(), requests: 20 };
                of(Policy::ClosedLoop, source)
            }
            // qserve_benchmark.py of OmniServe.
            "qserve" => of(Policy::AllAtStart, Source::Wave(Lengths { prompt: 1024, output: 512 })),
            // `vllm bench throughput` with its random data set.
            "vllm" => {
                let all = vec![Lengths { prompt: 1024, output: 128 }; 1000];
                of(Policy::AllAtStart, Source::List(all))
            }
            path if Path::new(path).extension().is_some_and(|extension| extension == "json") => {
                of(Policy::AllAtStart, Source::List(read(Path::new(path))?))
            }
            other => {
                return Err(Error::usage(format!("there is no workload `{other}`")).hint(
                    "give atom, qserve, vllm, or a .json file with a list of [prompt, output] tokens",
                ));
            }
        })
    }

    /// The same with `requests` requests for each sequence of the batch, where it has a number of them.
    ///
    /// # Errors
    /// A usage error where it has none.
    pub fn with_requests(mut self, count: usize) -> Result<Self> {
        match &mut self.source {
            Source::PerSequence { requests, .. } => *requests = count,
            _ => {
                return Err(Error::usage(format!("the requests of {} are fixed", self.name))
                    .hint("--requests is for --workload atom"));
            }
        }
        Ok(self)
    }

    /// Its requests, for a batch.
    pub fn requests(&self, batch: usize) -> Vec<Lengths> {
        match &self.source {
            Source::PerSequence { list, requests } => {
                list.iter().copied().cycle().take(requests * batch).collect()
            }
            Source::Wave(lengths) => vec![*lengths; batch],
            Source::List(list) => list.clone(),
        }
    }

    /// The most tokens of a request, which the memory of each sequence is reserved for.
    pub fn longest(&self) -> usize {
        let list = match &self.source {
            Source::PerSequence { list, .. } | Source::List(list) => list,
            Source::Wave(lengths) => std::slice::from_ref(lengths),
        };
        list.iter().map(|lengths| lengths.prompt + lengths.output).max().unwrap_or(0)
    }
}

fn atom_lengths() -> Vec<Lengths> {
    let lines = ATOM_LENGTHS.lines().filter(|line| !line.starts_with('#'));
    let pair = |pair: &str| {
        let (prompt, output) = pair.split_once(',').expect("pairs of numbers");
        let number = |text: &str| text.parse().expect("a number of tokens");
        Lengths { prompt: number(prompt), output: number(output) }
    };
    lines.flat_map(str::split_ascii_whitespace).map(pair).collect()
}

fn read(path: &Path) -> Result<Vec<Lengths>> {
    let wrong = |what: String| {
        Error::input(format!("{}: {what}", path.display()))
            .hint("a workload is a JSON list of [prompt tokens, output tokens], each 1 or more")
    };
    let text = fs_err::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let pairs: Vec<[usize; 2]> =
        serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if pairs.is_empty() {
        return Err(wrong("it has no requests".to_owned()));
    }
    if let Some(at) =
        pairs.iter().position(|pair| pair.contains(&0) || pair.iter().any(|&n| n > 1 << 20))
    {
        return Err(wrong(format!("request {at} has {:?} tokens", pairs[at])));
    }
    Ok(pairs.into_iter().map(|[prompt, output]| Lengths { prompt, output }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_references_requests_are_those_that_it_reports() {
        let workload = Workload::named("atom").unwrap();
        assert_eq!(workload.requests(256).len(), 5120);
        // README of the reference: 640 requests at batch 32.
        let requests = workload.requests(32);
        let sums = requests
            .iter()
            .fold((0, 0), |(prompt, output), own| (prompt + own.prompt, output + own.output));
        assert_eq!((requests.len(), sums), (640, (15_004, 636_994)));
        assert_eq!(requests[1], Lengths { prompt: 42, output: 1293 });
        assert!(workload.longest() <= 2048);
        // A prefix serves fewer.
        let fewer = workload.clone().with_requests(2).unwrap().requests(32);
        assert_eq!(fewer, requests[..64]);
    }

    #[test]
    fn other_workloads_have_their_published_lengths() {
        let qserve = Workload::named("qserve").unwrap();
        assert_eq!((qserve.requests(7).len(), qserve.longest()), (7, 1536));
        let vllm = Workload::named("vllm").unwrap();
        assert_eq!((vllm.requests(7).len(), vllm.longest()), (1000, 1152));
        assert!(vllm.with_requests(3).is_err());
    }

    #[test]
    fn files_are_read_and_what_is_no_workload_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("own.json");
        let named = |content: &str| {
            std::fs::write(&path, content).unwrap();
            Workload::named(path.to_str().unwrap())
        };
        let own = named("[[5, 7], [1, 1]]").unwrap();
        assert_eq!(
            own.requests(9),
            [Lengths { prompt: 5, output: 7 }, Lengths { prompt: 1, output: 1 }]
        );
        for content in ["", "[]", "[[0, 3]]", "[[3]]", "{}", "[[1, 99999999]]"] {
            assert_eq!(named(content).unwrap_err().kind(), crate::Kind::Input, "{content}");
        }
        assert_eq!(Workload::named("sharegpt").unwrap_err().kind(), crate::Kind::Usage);
        assert_eq!(Workload::named("absent.json").unwrap_err().kind(), crate::Kind::Input);
    }
}
