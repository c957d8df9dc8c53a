/*! Which rank of how many a process is: said by this program's launcher, torchrun, Slurm or MPI. */

use crate::{Error, Result};

/// What the program's own launcher sets, and whoever uses no other: the rank, how many there are, the rank among those of
/// the host, how many of these there are, and where rank 0 listens.
pub const RANK: &str = "ATOM_RANK";
/// See [`RANK`].
pub const RANKS: &str = "ATOM_RANKS";
/// See [`RANK`].
pub const LOCAL_RANK: &str = "ATOM_LOCAL_RANK";
/// See [`RANK`].
pub const LOCAL_RANKS: &str = "ATOM_LOCAL_RANKS";
/// See [`RANK`].
pub const MEET: &str = "ATOM_MEET";

/// The place of a process in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its rank.
    pub rank: usize,
    /// How many ranks there are.
    pub ranks: usize,
    /// Its rank among those of its host: which GPU it takes.
    pub local_rank: usize,
    /// Ranks of its host, where that is known.
    pub local_ranks: Option<usize>,
    /// Where rank 0 listens, `HOST:PORT`.
    pub address: String,
}

/// Reads a variable of the environment; tests have one of their own.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// How one launcher names what it says.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    ranks: &'static str,
    local_rank: &'static str,
    local_ranks: &'static str,
}

const OWN: Launcher = Launcher {
    name: "ATOM_RANK",
    rank: RANK,
    ranks: RANKS,
    local_rank: LOCAL_RANK,
    local_ranks: LOCAL_RANKS,
};
const TORCHRUN: Launcher = Launcher {
    name: "torchrun",
    rank: "RANK",
    ranks: "WORLD_SIZE",
    local_rank: "LOCAL_RANK",
    local_ranks: "LOCAL_WORLD_SIZE",
};
// A batch script has SLURM_PROCID and SLURM_NTASKS too, and is one process: what srun starts has these.
const SLURM: Launcher = Launcher {
    name: "srun",
    rank: "SLURM_PROCID",
    ranks: "SLURM_STEP_NUM_TASKS",
    local_rank: "SLURM_LOCALID",
    local_ranks: "SLURM_STEP_TASKS_PER_NODE",
};
const OPEN_MPI: Launcher = Launcher {
    name: "mpirun",
    rank: "OMPI_COMM_WORLD_RANK",
    ranks: "OMPI_COMM_WORLD_SIZE",
    local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
    local_ranks: "OMPI_COMM_WORLD_LOCAL_SIZE",
};
const MPICH: Launcher = Launcher {
    name: "mpirun",
    rank: "PMI_RANK",
    ranks: "PMI_SIZE",
    local_rank: "MPI_LOCALRANKID",
    local_ranks: "MPI_LOCALNRANKS",
};

/// The ports that runs of Slurm and MPI choose from by their job's number.
const PORTS: std::ops::Range<u64> = 20000..30000;

impl Place {
    /// The place that the environment gives this process; none where it is alone. `address` is where the user has
    /// the ranks meet.
    ///
    /// # Errors
    /// Usage: what the environment says makes no sense, or it does not say where rank 0 is.
    pub fn from_environment(
        variables: Variables<'_>,
        address: Option<&str>,
    ) -> Result<Option<Self>> {
        let launchers = [OWN, TORCHRUN, SLURM, OPEN_MPI, MPICH];
        let mut found = None;
        for launcher in launchers {
            if variables(launcher.rank).is_some() && variables(launcher.ranks).is_some() {
                found = Some(launcher);
                break;
            }
        }
        let Some(launcher) = found else {
            return match address {
                None => Ok(None),
                Some(address) => Err(Error::usage(format!(
                    "--ranks {address} says where ranks meet, but not which rank this is"
                ))
                .hint("start the processes by torchrun, srun or mpirun, or set ATOM_RANK and ATOM_RANKS for each")),
            };
        };
        let number = |name: &str| number(variables, name);
        let (rank, ranks) =
            (number(launcher.rank)?.unwrap_or(0), number(launcher.ranks)?.unwrap_or(1));
        if ranks == 1 && address.is_none() {
            return Ok(None);
        }
        if rank >= ranks {
            let Launcher { name, rank: variable, .. } = launcher;
            return Err(Error::usage(format!("{name} says {variable}={rank} of {ranks} ranks")));
        }
        // `4(x2)` in Slurm's words, where all hosts have as many.
        let local_ranks = variables(launcher.local_ranks)
            .and_then(|text| text.split(['(', ',']).next().and_then(|first| first.parse().ok()));
        let local_rank = match number(launcher.local_rank)? {
            Some(local_rank) => local_rank,
            None => rank % local_ranks.unwrap_or(ranks),
        };
        let address = match address {
            Some(address) => address.to_owned(),
            None => launcher.address(variables, ranks, local_ranks)?,
        };
        Ok(Some(Self { rank, ranks, local_rank, local_ranks, address }))
    }
}

impl Launcher {
    /// Where rank 0 listens.
    fn address(
        &self,
        variables: Variables<'_>,
        ranks: usize,
        local_ranks: Option<usize>,
    ) -> Result<String> {
        let unknown = |why: &str| {
            Error::usage(format!("{} does not say where rank 0 runs: {why}", self.name))
                .hint("give all ranks --ranks HOST:PORT, with the host of rank 0 and a free port")
        };
        match self.rank {
            RANK => variables(MEET).ok_or_else(|| unknown("ATOM_MEET is not set")),
            "RANK" => {
                let host =
                    variables("MASTER_ADDR").ok_or_else(|| unknown("MASTER_ADDR is not set"))?;
                let port = number(variables, "MASTER_PORT")?;
                let port = port.ok_or_else(|| unknown("MASTER_PORT is not set"))?;
                // That port is torchrun's own.
                Ok(format!("{host}:{}", port + 1))
            }
            "SLURM_PROCID" => {
                let nodes =
                    variables("SLURM_STEP_NODELIST").or_else(|| variables("SLURM_NODELIST"));
                let host = nodes.as_deref().and_then(first_node);
                let host = host.ok_or_else(|| unknown("SLURM_STEP_NODELIST names no host"))?;
                let job = variables("SLURM_JOB_ID").unwrap_or_default();
                let step = variables("SLURM_STEP_ID").unwrap_or_default();
                Ok(format!("{host}:{}", port_of(&format!("{job}.{step}"))))
            }
            _ if local_ranks == Some(ranks) => {
                let job = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_FD", "PMI_PORT"];
                let job = job.iter().find_map(|name| variables(name)).unwrap_or_default();
                Ok(format!("127.0.0.1:{}", port_of(&job)))
            }
            _ => Err(unknown("the run has several hosts")),
        }
    }
}

/// The number in a variable.
fn number(variables: Variables<'_>, name: &str) -> Result<Option<usize>> {
    let Some(text) = variables(name) else { return Ok(None) };
    let parsed = text.trim().parse();
    parsed.map(Some).map_err(|_| Error::usage(format!("{name}={text} is no number of ranks")))
}

/// A port for a job: the same on all of its ranks, and of another job most likely another.
fn port_of(job: &str) -> u64 {
    // FNV-1a.
    let hash = job.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    PORTS.start + hash % (PORTS.end - PORTS.start)
}

/// The first host of Slurm's list, such as `gpu[07-09,12],login1`.
fn first_node(nodes: &str) -> Option<String> {
    let Some((before, after)) = nodes.split_once('[').filter(|(before, _)| !before.contains(','))
    else {
        return nodes.split(',').next().filter(|node| !node.is_empty()).map(str::to_owned);
    };
    let (numbers, after) = after.split_once(']')?;
    let number = numbers.split([',', '-']).next()?;
    let suffix = after.split(',').next().unwrap_or_default();
    Some(format!("{before}{number}{suffix}"))
}

#[cfg(test)]
#[path = "place_tests.rs"]
mod tests;
