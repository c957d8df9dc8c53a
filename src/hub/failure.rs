/*! What goes wrong between us and the Hub, and whether another attempt may help: decided by types and
status codes, never by the words of a message. */

use std::io::{self, ErrorKind};
use std::time::Duration;

use ureq::Timeout;

use super::settings::Endpoint;
use crate::Error;

const CERTIFICATES: &str =
    "install the system's certificates (`ca-certificates` on Debian), or set SSL_CERT_FILE";
const NETWORK: &str = "look at the network, the proxy and HF_ENDPOINT; what the Hub's cache holds works with --offline";
pub(super) const ANOTHER_SERVER: &str = "look at HF_ENDPOINT and at the proxy, if there is one";

/// An error with what it means for the next attempt.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) nature: Nature,
}

/// Whether another attempt may end differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nature {
    /// The same question has the same answer.
    Final,
    /// There is no way to the Hub: no network, no such host, no listener, no valid certificate.
    Unreachable,
    /// The network or the Hub has trouble that may pass.
    Passing {
        /// How long the Hub asks to be left alone.
        wait: Option<Duration>,
    },
}

impl Failure {
    /// Trouble that may pass.
    pub(super) fn passing(error: Error) -> Self {
        Self { error, nature: Nature::Passing { wait: None } }
    }

    /// The same trouble in the middle of a body: whatever it is, the body can be asked for again.
    pub(super) fn into_cut(self) -> Self {
        Self::passing(self.error)
    }

    /// An answer that is not the Hub's.
    pub(super) fn odd_answer(address: impl std::fmt::Display, what: &str) -> Self {
        Error::machine(format!("{address} did not answer as the Hub does: {what}"))
            .hint(ANOTHER_SERVER)
            .into()
    }

    /// An answer that did not come in time.
    pub(super) fn too_slow(endpoint: &Endpoint, what: &str) -> Self {
        Self::passing(Error::machine(what).context(format!("cannot reach {endpoint}")).hint(
            format!(
                "{NETWORK}; HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT allow more seconds"
            ),
        ))
    }

    /// A request that brought no answer.
    pub(super) fn of_request(error: &ureq::Error, endpoint: &Endpoint) -> Self {
        let hint = if is_certificate(error) { CERTIFICATES } else { NETWORK };
        let error_in_words = Error::machine(words(error));
        let nature = nature(error);
        let error = match error {
            ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => error_in_words
                .context(format!("{endpoint} did not answer as the Hub does"))
                .hint(ANOTHER_SERVER),
            _ => error_in_words.context(format!("cannot reach {endpoint}")).hint(hint),
        };
        Self { error, nature }
    }

    /// Whether the Hub could not be asked, so that what its cache holds is the better answer.
    pub(super) fn is_the_networks(&self) -> bool {
        self.nature != Nature::Final
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, nature: Nature::Final }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

/// The cause without any address: one may hold a password.
fn words(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => error.to_string(),
        ureq::Error::BadUri(_) | ureq::Error::RequireHttpsOnly(_) | ureq::Error::Http(_) => {
            "the request cannot be sent".to_owned()
        }
        error => error.to_string(),
    }
}

fn nature(error: &ureq::Error) -> Nature {
    let passing = Nature::Passing { wait: None };
    match error {
        ureq::Error::Io(error) => match error.kind() {
            ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
            | ErrorKind::TimedOut
            | ErrorKind::WouldBlock => passing,
            _ => Nature::Unreachable,
        },
        ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => Nature::Unreachable,
        ureq::Error::Timeout(_) | ureq::Error::Protocol(_) | ureq::Error::BodyStalled => passing,
        ureq::Error::BadUri(_)
        | ureq::Error::RequireHttpsOnly(_)
        | ureq::Error::Http(_)
        | ureq::Error::LargeResponseHeader(..) => Nature::Final,
        _ => Nature::Unreachable,
    }
}

/// Whether the other side could not prove who it is.
fn is_certificate(error: &ureq::Error) -> bool {
    let of_tls = |error: &io::Error| {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        inner.is_some_and(|error| {
            matches!(
                error,
                rustls::Error::InvalidCertificate(_)
                    | rustls::Error::InvalidCertRevocationList(_)
                    | rustls::Error::NoCertificatesPresented
            )
        })
    };
    match error {
        ureq::Error::Io(error) => of_tls(error),
        // Before the first byte: the system's certificates could not be loaded.
        ureq::Error::Rustls(_) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io(kind: ErrorKind) -> ureq::Error {
        ureq::Error::Io(io::Error::new(kind, "a certificate that cannot be reached"))
    }

    #[test]
    fn types_decide_whether_trouble_may_pass() {
        let passing = Nature::Passing { wait: None };
        for (error, expected) in [
            (io(ErrorKind::ConnectionReset), passing),
            (io(ErrorKind::UnexpectedEof), passing),
            (io(ErrorKind::ConnectionRefused), Nature::Unreachable),
            (io(ErrorKind::NetworkUnreachable), Nature::Unreachable),
            (ureq::Error::HostNotFound, Nature::Unreachable),
            (ureq::Error::Timeout(Timeout::Connect), Nature::Unreachable),
            (ureq::Error::Timeout(Timeout::RecvResponse), passing),
            (ureq::Error::LargeResponseHeader(2, 1), Nature::Final),
        ] {
            assert_eq!(nature(&error), expected, "{error}");
            assert!(!is_certificate(&error), "the word in a message says nothing: {error}");
        }
    }

    #[test]
    fn a_certificate_is_told_by_its_error() {
        let invalid = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let error = ureq::Error::Io(io::Error::new(ErrorKind::InvalidData, invalid));
        assert!(is_certificate(&error));
        assert_eq!(nature(&error), Nature::Unreachable);
        let other = rustls::Error::HandshakeNotComplete;
        assert!(!is_certificate(&ureq::Error::Io(io::Error::new(ErrorKind::InvalidData, other))));
    }

    #[test]
    fn no_address_is_repeated() {
        let error = ureq::Error::BadUri("https://me:secret@h is missing".to_owned());
        assert!(!words(&error).contains("secret"));
    }
}
