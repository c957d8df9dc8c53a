/*! How processes find each other: rank 0 listens, the others connect, and each learns where the others are. */

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Place;
use super::frames::{read_frame, write_frame};
use crate::{Error, Result};

/// How long ranks wait for each other before the run.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a rank waits before it says for whom.
const SILENCE: Duration = Duration::from_secs(15);
/// How long a connection may take to say who it is.
const GREETING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// The version that every rank must have.
const VERSION: &str = env!("ATOM_VERSION");

/// What a rank says first.
#[derive(Serialize, Deserialize)]
struct Hello {
    version: String,
    rank: usize,
    ranks: usize,
    host: String,
    /// Where it listens for ranks after it.
    port: u16,
}

/// What rank 0 answers.
#[derive(Serialize, Deserialize)]
enum Answer {
    /// Where every rank listens, and its host's name.
    Welcome(Vec<(SocketAddr, String)>),
    Refused(String),
}

/// The connections of a rank.
pub(super) struct Connections {
    /// For messages about the run: of rank 0 to all others, of these to rank 0.
    pub(super) control: Vec<(usize, TcpStream)>,
    /// For data, to each other rank.
    pub(super) data: Vec<(usize, TcpStream)>,
    /// The hosts' names.
    pub(super) hosts: Vec<String>,
}

/// Who waits until all ranks are there.
pub(super) struct Waiting<'a> {
    /// Takes what a person should know.
    pub(super) notify: &'a (dyn Fn(String) + Send + Sync),
    /// An error ends the waiting.
    pub(super) check: &'a mut dyn FnMut() -> Result<()>,
}

/// Connects a rank with all others. `listener` is rank 0's, where it listens already.
///
/// # Errors
/// Machine: the others do not come, or cannot be reached. Usage: ranks disagree.
pub(super) fn meet(
    place: &Place,
    listener: Option<TcpListener>,
    waiting: &mut Waiting<'_>,
) -> Result<Connections> {
    if place.rank == 0 {
        let listener = listener.map_or_else(|| listen(&place.address), Ok)?;
        return welcome(place, &listener, waiting);
    }
    let (mut control, address) = reach_first(place, waiting)?;
    let own_address = control.local_addr().map_err(|error| lost(0, &error))?.ip();
    let listener = TcpListener::bind((own_address, 0)).map_err(|error| lost(0, &error))?;
    let port = listener.local_addr().map_err(|error| lost(0, &error))?.port();
    let (rank, ranks) = (place.rank, place.ranks);
    let hello = Hello { version: VERSION.to_owned(), rank, ranks, host: host_name(), port };
    let greet = |stream: &mut TcpStream| write_frame(stream, &hello);
    greet(&mut control).map_err(|error| lost(0, &error))?;
    control.set_read_timeout(Some(PATIENCE)).map_err(|error| lost(0, &error))?;
    let welcome = match read_frame(&mut control).map_err(|error| lost(0, &error))? {
        Answer::Welcome(welcome) => welcome,
        Answer::Refused(why) => return Err(refused(why)),
    };
    control.set_read_timeout(None).map_err(|error| lost(0, &error))?;
    let mut data = Vec::new();
    // To those before it a rank connects, and those after it connect to it.
    for (other, (others, _)) in welcome.iter().enumerate().take(rank) {
        let to = if other == 0 { address } else { *others };
        let mut stream = TcpStream::connect(to).map_err(|error| lost(other, &error))?;
        greet(&mut stream).map_err(|error| lost(other, &error))?;
        data.push((other, stream));
    }
    data.extend(
        accept(&listener, place, rank + 1, waiting)?
            .into_iter()
            .map(|(hello, stream)| (hello.rank, stream)),
    );
    let hosts = welcome.into_iter().map(|(_, host)| host).collect();
    Ok(Connections { control: vec![(0, control)], data, hosts })
}

/// Listens at an address, or at all of the host's where the name is of one of them.
pub(super) fn listen(address: &str) -> Result<TcpListener> {
    let named = resolve(address)?;
    let port = named[0].port();
    let everywhere = ([0, 0, 0, 0], port).into();
    let is_local = named.iter().all(|address| address.ip().is_loopback());
    let bound =
        if is_local { TcpListener::bind(&named[..]) } else { TcpListener::bind(&[everywhere][..]) };
    bound.map_err(|error| {
        Error::machine(format!("rank 0 cannot listen at {address}: {error}"))
            .hint("give --ranks another port, or end what uses this one")
    })
}

fn resolve(address: &str) -> Result<Vec<SocketAddr>> {
    let wrong = |why: String| {
        Error::usage(format!("no ranks can meet at `{address}`: {why}"))
            .hint("an address is HOST:PORT, the host being that of rank 0")
    };
    let found: Vec<_> =
        address.to_socket_addrs().map_err(|error| wrong(error.to_string()))?.collect();
    if found.is_empty() { Err(wrong("the host has no address".to_owned())) } else { Ok(found) }
}

/// Rank 0's part.
fn welcome(
    place: &Place,
    listener: &TcpListener,
    waiting: &mut Waiting<'_>,
) -> Result<Connections> {
    let mut guests = accept(listener, place, 1, waiting)?;
    let own = listener.local_addr().map_err(|error| lost(0, &error))?;
    let mut welcome = vec![(own, host_name())];
    for (hello, stream) in &guests {
        let address = stream.peer_addr().map_err(|error| lost(hello.rank, &error))?.ip();
        welcome.push((SocketAddr::new(address, hello.port), hello.host.clone()));
    }
    let hosts = welcome.iter().map(|(_, host)| host.clone()).collect();
    let answer = Answer::Welcome(welcome);
    for (hello, stream) in &mut guests {
        write_frame(stream, &answer).map_err(|error| lost(hello.rank, &error))?;
    }
    let of = |guests: Vec<(Hello, TcpStream)>| {
        guests.into_iter().map(|(hello, stream)| (hello.rank, stream)).collect()
    };
    let data = accept(listener, place, 1, waiting)?;
    Ok(Connections { control: of(guests), data: of(data), hosts })
}

/// A connection of each rank from `first` on, in their order.
fn accept(
    listener: &TcpListener,
    place: &Place,
    first: usize,
    waiting: &mut Waiting<'_>,
) -> Result<Vec<(Hello, TcpStream)>> {
    let failed = |error: io::Error| Error::machine(format!("cannot accept connections: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let mut guests: Vec<Option<(Hello, TcpStream)>> = (first..place.ranks).map(|_| None).collect();
    let (start, mut said) = (Instant::now(), Instant::now());
    while guests.iter().any(Option::is_none) {
        (waiting.check)()?;
        let missing = || {
            let ranks = guests.iter().zip(first..).filter(|(guest, _)| guest.is_none());
            let ranks: Vec<String> = ranks.map(|(_, rank)| rank.to_string()).collect();
            format!("rank {} of {}", ranks.join(", "), place.ranks)
        };
        if start.elapsed() > PATIENCE {
            return Err(Error::machine(format!(
                "{} did not connect within {} minutes",
                missing(),
                PATIENCE.as_secs() / 60
            ))
            .hint("look at their output, and at firewalls between the hosts"));
        }
        if said.elapsed() > SILENCE {
            said = Instant::now();
            (waiting.notify)(format!("waiting for {} at {}", missing(), place.address));
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                sleep(PAUSE);
                continue;
            }
            Err(error) => return Err(failed(error)),
        };
        // What is no rank is not answered.
        let Ok((hello, mut stream)) = greeted(stream) else { continue };
        let wrong = check(&hello, place, first, &guests);
        if let Some(why) = wrong {
            let _ = write_frame(&mut stream, &Answer::Refused(why.clone()));
            return Err(refused(why));
        }
        let at = hello.rank - first;
        guests[at] = Some((hello, stream));
    }
    Ok(guests.into_iter().flatten().collect())
}

fn greeted(stream: TcpStream) -> io::Result<(Hello, TcpStream)> {
    let mut stream = stream;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(GREETING))?;
    let hello = read_frame(&mut stream)?;
    stream.set_read_timeout(None)?;
    Ok((hello, stream))
}

/// What is wrong with a rank, if anything.
fn check(
    hello: &Hello,
    place: &Place,
    first: usize,
    guests: &[Option<(Hello, TcpStream)>],
) -> Option<String> {
    let Hello { version, rank, ranks, host, .. } = hello;
    let own = place.rank;
    if version != VERSION {
        return Some(format!(
            "rank {rank} on {host} is atom {version}, and rank {own} is {VERSION}"
        ));
    }
    if *ranks != place.ranks {
        let counted = place.ranks;
        return Some(format!(
            "rank {rank} on {host} counts {ranks} ranks, and rank {own} {counted}"
        ));
    }
    match rank.checked_sub(first).and_then(|at| guests.get(at)) {
        None => Some(format!("rank {rank} on {host} is not expected here")),
        Some(Some(_)) => Some(format!("two processes are rank {rank}, one of them on {host}")),
        Some(None) => None,
    }
}

/// A connection to rank 0, which may start later.
fn reach_first(place: &Place, waiting: &mut Waiting<'_>) -> Result<(TcpStream, SocketAddr)> {
    let (start, mut said) = (Instant::now(), Instant::now());
    loop {
        (waiting.check)()?;
        // Resolved each time: names of a job's hosts can appear late.
        let failed = match resolve(&place.address) {
            Err(error) => error.message(),
            Ok(addresses) => match connect_any(&addresses) {
                Ok(connected) => return Ok(connected),
                Err(error) => error.to_string(),
            },
        };
        if start.elapsed() > PATIENCE {
            return Err(Error::machine(format!(
                "rank {} cannot reach rank 0 at {}: {failed}",
                place.rank, place.address
            ))
            .hint("is it running there, and does no firewall keep this host from it?"));
        }
        if said.elapsed() > SILENCE {
            said = Instant::now();
            (waiting.notify)(format!(
                "rank {} is waiting for rank 0 at {}",
                place.rank, place.address
            ));
        }
        sleep(PAUSE);
    }
}

fn connect_any(addresses: &[SocketAddr]) -> io::Result<(TcpStream, SocketAddr)> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match TcpStream::connect_timeout(address, GREETING) {
            Ok(stream) => return Ok((stream, *address)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn lost(rank: usize, error: &io::Error) -> Error {
    Error::machine(format!("the connection with rank {rank} failed: {error}"))
}

fn refused(why: String) -> Error {
    Error::usage(why).hint("start all ranks with the same program and the same number of ranks")
}

/// The host's name, for people.
fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the buffer is as long as is said, and its last byte stays zero.
    let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) } != 0;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    if failed { "?".to_owned() } else { String::from_utf8_lossy(&name[..end]).into_owned() }
}
