/*! Which ranks share a command's work: processes that it starts itself, or that a launcher has started. */

use std::ffi::OsString;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;

use super::Ui;
use super::args::{DeviceFlag, Opened};
use super::values::Device;
use crate::backend::Exchange;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, libraries};
use crate::progress::Progress;
use crate::ranks::{
    Alone, Collectives, LOCAL_RANKS, Launched, MEET, Place, RANK, TcpRanks, Unnoticed,
};
use crate::{Error, Result};

#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Running")]
pub(crate) struct RanksFlags {
    /// GPUs of this host that share the work, with the same result: a number, or all
    #[arg(long, value_name = "N|all", conflicts_with = "ranks", display_order = 1001)]
    gpus: Option<Gpus>,
    /// Where the processes of a run on several hosts meet: the host of rank 0 and a free port. torchrun and srun say it
    /// themselves. A number instead starts so many processes on this host, also without GPUs
    #[arg(long, value_name = "HOST:PORT|N", display_order = 1001)]
    ranks: Option<Meeting>,
}

/// How many GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gpus {
    All,
    Number(usize),
}

impl FromStr for Gpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(Self::Number(number)),
            _ if text == "all" => Ok(Self::All),
            _ => Err("it is a number of GPUs from 1 on, or all".to_owned()),
        }
    }
}

/// Where ranks meet, or how many there are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Meeting {
    Address(String),
    Number(usize),
}

impl FromStr for Meeting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse() {
            return match number {
                1..=1024 => Ok(Self::Number(number)),
                _ => Err("a host runs 1 to 1024 processes".to_owned()),
            };
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Address(text.to_owned()))
            }
            _ => Err("ranks meet at HOST:PORT, such as node1:29600".to_owned()),
        }
    }
}

/// The ranks that share a command's work, as one of them sees them.
pub(crate) struct Team {
    ranks: Arc<dyn Collectives>,
    place: Option<Place>,
}

impl Team {
    /// One rank.
    pub(crate) fn alone() -> Self {
        Self { ranks: Arc::new(Alone), place: None }
    }

    /// Whether this rank writes what there is to write.
    pub(crate) fn is_first(&self) -> bool {
        self.ranks.is_first()
    }

    /// Work that fetches or writes files: rank 0 does it first, the others find them there.
    pub(crate) fn first_alone<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        if self.is_first() {
            let done = work()?;
            self.ranks.barrier()?;
            return Ok(done);
        }
        self.ranks.barrier()?;
        work()
    }

    /// Opens the device of this rank: of several GPUs of a host its own.
    pub(crate) fn open(&self, flag: &DeviceFlag) -> Result<Opened> {
        let Some(place) = &self.place else { return flag.open() };
        let cuda = |first: usize| {
            // A launcher may show each process its GPU alone.
            let devices = libraries::driver()?.devices;
            let own = if devices == 1 { 0 } else { first + place.local_rank };
            let mut cuda = Box::new(Cuda::open(own, flag.gpu_memory)?);
            cuda.join(Arc::clone(&self.ranks))?;
            Ok(Opened::Cuda(cuda))
        };
        let cpu = |why| {
            let mut cpu = Cpu::new()?;
            cpu.join(Arc::clone(&self.ranks))?;
            Ok(Opened::Cpu(cpu, why))
        };
        match flag.device {
            Device::Cpu => cpu(None),
            Device::Cuda(first) => cuda(first),
            Device::Auto => {
                let found = libraries::driver();
                let all = self.ranks.gather_all(vec![u8::from(found.is_ok())])?;
                let with = all.iter().filter(|found| found[0] == 1).count();
                match found {
                    Ok(_) if with == all.len() => cuda(0),
                    Err(why) if with == 0 => cpu(Some(why)),
                    _ => {
                        let ranks = all.len();
                        let message = format!("{with} of {ranks} ranks have a GPU");
                        Err(Error::machine(message)
                            .hint("give each a GPU and --device cuda, or all --device cpu"))
                    }
                }
            }
        }
    }
}

impl RanksFlags {
    /// Processes of this run on this host, as far as is known before it.
    pub(crate) fn local_ranks(&self) -> usize {
        let told = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
        match (self.gpus, &self.ranks) {
            _ if told(RANK).is_some() => told(LOCAL_RANKS).unwrap_or(1),
            (Some(Gpus::Number(number)), _) => number,
            (_, Some(Meeting::Number(number))) => *number,
            (Some(Gpus::All), _) => libraries::driver().map_or(1, |driver| driver.devices),
            _ => match Place::from_environment(&variable, None) {
                Ok(Some(place)) => place.local_ranks.unwrap_or(1),
                _ => 1,
            },
        }
        .max(1)
    }

    /// Does some work on all ranks. What one of them fails with, all end with.
    pub(crate) fn share<T>(
        &self,
        device: &DeviceFlag,
        typed: &[OsString],
        ui: &Ui,
        work: impl FnOnce(&Team) -> Result<T>,
    ) -> Result<T> {
        let mut launched = None;
        let mut listener = None;
        let place = match self.number(device)? {
            Some(1) => None,
            Some(number) => {
                let (children, place, own) = Launched::start(typed, number)?;
                launched = Some(children);
                listener = Some(own);
                Some(place)
            }
            None => self.place()?,
        };
        let Some(place) = place else { return work(&Team::alone()) };
        let is_first = place.rank == 0;
        if !is_first {
            ui.mute();
        }
        let notify = ui.notify();
        let mut check = || {
            ui.check_stop()?;
            match launched.as_mut().and_then(Launched::ended_early) {
                None => Ok(()),
                Some((rank, code)) => Err(ended_early(rank, code)),
            }
        };
        let ranks =
            TcpRanks::join(place.clone(), listener, notify, Unnoticed::EndsProcess, &mut check)?;
        let ranks = Arc::new(ranks);
        let team = Team { ranks: Arc::clone(&ranks) as Arc<dyn Collectives>, place: Some(place) };
        let result = ranks.finish(work(&team));
        match &result {
            // Rank 0 shows it.
            Err(error) if !is_first && (ranks.told() || variable(MEET).is_some()) => {
                ui.close();
                std::process::exit(error.kind() as i32);
            }
            _ => {}
        }
        // Those that still run after an error have some seconds to end.
        drop(launched);
        result
    }

    /// How many processes are to be started here, if any are.
    fn number(&self, device: &DeviceFlag) -> Result<Option<usize>> {
        if variable(RANK).is_some() {
            return Ok(None);
        }
        let (flag, number) = match (self.gpus, &self.ranks) {
            (Some(_), _) if device.device == Device::Cpu => {
                return Err(Error::usage("--gpus names GPUs, and --device cpu uses none")
                    .hint("leave one of them out; --ranks N starts processes without GPUs"));
            }
            (Some(gpus), _) => {
                let devices = libraries::driver()?.devices;
                let number = match gpus {
                    Gpus::All => devices,
                    Gpus::Number(number) if number <= devices => number,
                    Gpus::Number(number) => {
                        let message = format!("--gpus {number} is more than the {devices} here");
                        return Err(
                            Error::machine(message).hint("CUDA_VISIBLE_DEVICES may hide some")
                        );
                    }
                };
                ("--gpus", number)
            }
            (None, Some(Meeting::Number(number))) => ("--ranks", *number),
            _ => return Ok(None),
        };
        if Place::from_environment(&variable, None).is_ok_and(|place| place.is_some()) {
            return Err(Error::usage(format!(
                "{flag} starts the ranks of a run, and a launcher has"
            ))
            .hint(format!("leave {flag} out under torchrun, srun and mpirun")));
        }
        Ok(Some(number))
    }

    /// This process's place by the environment.
    fn place(&self) -> Result<Option<Place>> {
        let address = match &self.ranks {
            Some(Meeting::Address(address)) => Some(address.as_str()),
            _ => None,
        };
        Place::from_environment(&variable, address)
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn ended_early(rank: usize, code: Option<i32>) -> Error {
    let how = match code {
        Some(code) => format!("with exit code {code}"),
        None => "by a signal".to_owned(),
    };
    Error::machine(format!("rank {rank} ended {how} before the run began"))
        .hint("its own message stands above")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_addresses_are_told_apart() {
        assert_eq!("all".parse(), Ok(Gpus::All));
        assert_eq!("2".parse(), Ok(Gpus::Number(2)));
        assert_eq!("3".parse(), Ok(Meeting::Number(3)));
        assert_eq!("node-1:29600".parse(), Ok(Meeting::Address("node-1:29600".to_owned())));
        for wrong in ["0", "x", "-1", ""] {
            assert!(wrong.parse::<Gpus>().is_err());
        }
        for wrong in ["0", "node", "node:", ":1", "node:99999", "5000"] {
            assert!(wrong.parse::<Meeting>().is_err(), "{wrong}");
        }
    }
}
