/*! Several ranks on one host: this process is the first and starts the others. */

use std::ffi::OsString;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Place;
use super::place::{LOCAL_RANK, LOCAL_RANKS, MEET, RANK, RANKS};
use crate::{Error, Result};

/// How long the others may take to end after the run.
const GRACE: Duration = Duration::from_secs(8);

/// The processes that were started. Those that still run are killed when it is dropped.
pub struct Launched {
    children: Vec<Child>,
}

impl Launched {
    /// Starts this program again, with the same arguments, as ranks 1 to `ranks - 1`; this process is rank 0, which
    /// listens.
    ///
    /// # Errors
    /// A machine error if a process cannot be started, or no port is free.
    pub fn start(arguments: &[OsString], ranks: usize) -> Result<(Self, Place, TcpListener)> {
        let failed = |what: &str, error: std::io::Error| {
            Error::machine(format!("cannot {what}: {error}"))
                .hint("look at the limits on processes (`ulimit -u`) and on memory")
        };
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .map_err(|error| failed("listen for other ranks", error))?;
        let address =
            listener.local_addr().map_err(|error| failed("listen for other ranks", error))?;
        let program =
            std::env::current_exe().map_err(|error| failed("find this program's file", error))?;
        let mut launched = Self { children: Vec::new() };
        for rank in 1..ranks {
            let rank = rank.to_string();
            let child = Command::new(&program)
                .args(arguments.iter().skip(1))
                .env(RANK, &rank)
                .env(RANKS, ranks.to_string())
                .env(LOCAL_RANK, &rank)
                .env(LOCAL_RANKS, ranks.to_string())
                .env(MEET, address.to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .map_err(|error| failed(&format!("start rank {rank}"), error))?;
            launched.children.push(child);
        }
        let address = address.to_string();
        let place = Place { rank: 0, ranks, local_rank: 0, local_ranks: Some(ranks), address };
        Ok((launched, place, listener))
    }

    /// Whether one of the processes has ended, and with which exit code.
    pub fn ended_early(&mut self) -> Option<(usize, Option<i32>)> {
        let ended = |(number, child): (usize, &mut Child)| {
            let status = child.try_wait().ok().flatten()?;
            Some((number + 1, status.code()))
        };
        self.children.iter_mut().enumerate().find_map(ended)
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let start = Instant::now();
        for child in &mut self.children {
            while matches!(child.try_wait(), Ok(None)) {
                if start.elapsed() > GRACE {
                    let _ = child.kill();
                    let _ = child.wait();
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
