/*! Whether the ranks of a run do the same job. */

use serde_json::Value;

use crate::checkpoint::{Difference, differences};
use crate::ranks::Collectives;
use crate::{Error, Result};

/// Differences that are named.
const NAMED: usize = 6;

/// Refuses ranks whose jobs differ, before any work: `own` is all that decides the bytes of this rank's.
///
/// # Errors
/// On every rank an input error that names the rank and what differs.
pub(super) fn agree(ranks: &dyn Collectives, own: &Value) -> Result<()> {
    let own = own.to_string().into_bytes();
    let all = ranks.gather(own.clone())?;
    let read = |message: &[u8]| serde_json::from_slice::<Value>(message).unwrap_or_default();
    let first = read(&own);
    let mut found = String::new();
    for (rank, message) in all.iter().enumerate().skip(1) {
        let differences = differences(&first, &read(message)).into_iter().take(NAMED);
        let named = differences.map(|Difference { key, values: [one, other] }| {
            format!("{key} is {one} on rank 0 and {other} on rank {rank}")
        });
        let named: Vec<String> = named.collect();
        if !named.is_empty() {
            found = named.join("; ");
            break;
        }
    }
    match ranks.broadcast(0, found.into_bytes())? {
        found if found.is_empty() => Ok(()),
        found => {
            let found = String::from_utf8_lossy(&found);
            Err(Error::input(format!("the ranks of the run differ: {found}"))
                .hint("give all ranks the same program, model, text and settings"))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ranks::thread_ranks;

    #[test]
    fn what_differs_is_named_on_every_rank() {
        let jobs = [
            json!({"recipe": {"bits": 4}}),
            json!({"recipe": {"bits": 4}}),
            json!({"recipe": {"bits": 3}}),
        ];
        let messages = |jobs: &[Value]| -> Vec<Option<String>> {
            std::thread::scope(|scope| {
                let ranks = thread_ranks(jobs.len()).into_iter().zip(jobs);
                let threads = ranks.map(|(rank, job)| {
                    scope.spawn(move || agree(&rank, job).err().map(|error| error.message()))
                });
                let threads: Vec<_> = threads.collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            })
        };
        let named = "the ranks of the run differ: recipe.bits is 4 on rank 0 and 3 on rank 2";
        assert_eq!(messages(&jobs), [const { Some(()) }; 3].map(|_| Some(named.to_owned())));
        assert_eq!(messages(&jobs[..2]), [None, None]);
    }
}
