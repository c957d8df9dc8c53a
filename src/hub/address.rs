/*! Addresses: whose origin they name, where a redirect leads, and how they are shown without secrets. */

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::percent_decode_str;
use ureq::http::Uri;

/// An absolute address of HTTP or HTTPS.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Address {
    uri: Uri,
}

/// Scheme, host and port: what must be equal for credentials to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Address {
    /// `None` unless `text` is an absolute address of HTTP or HTTPS with a host.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let uri: Uri = text.parse().ok()?;
        let scheme = uri.scheme_str()?;
        let known = ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
        let authority = uri.authority()?;
        let host = authority.host();
        let (_, port) = authority.as_str().rsplit_once(host)?;
        // `Uri` takes any text for a port, and nobody would connect to it.
        let has_port = ["", ":"].contains(&port) || authority.port_u16().is_some();
        (known && !host.is_empty() && has_port).then_some(Self { uri })
    }

    /// What `ureq` asks.
    pub(super) fn uri(&self) -> &Uri {
        &self.uri
    }

    pub(super) fn origin(&self) -> Origin {
        let scheme = self.uri.scheme_str().unwrap_or_default().to_ascii_lowercase();
        let port = self.uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        let host = self.uri.host().unwrap_or_default().to_ascii_lowercase();
        Origin { scheme, host, port }
    }

    /// The value of an `authorization` header for the user and password in the address, if it has any.
    pub(super) fn basic_authorization(&self) -> Option<String> {
        let (userinfo, _) = self.uri.authority()?.as_str().rsplit_once('@')?;
        let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
        let mut plain: Vec<u8> = percent_decode_str(user).collect();
        plain.push(b':');
        plain.extend(percent_decode_str(password));
        Some(format!("Basic {}", STANDARD.encode(plain)))
    }

    /// The same address without user and password.
    pub(super) fn without_userinfo(&self) -> Self {
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        let Some((_, host)) = authority.rsplit_once('@') else { return self.clone() };
        let mut parts = self.uri.clone().into_parts();
        parts.authority = host.parse().ok();
        Uri::from_parts(parts).map_or_else(|_| self.clone(), |uri| Self { uri })
    }

    /// Where `reference`, the value of a `location` header, leads from here (RFC 3986, section 5).
    /// `None` if it is no address of HTTP or HTTPS.
    pub(super) fn join(&self, reference: &str) -> Option<Self> {
        let reference = reference.split('#').next().unwrap_or_default();
        if has_scheme(reference) {
            return Self::parse(reference);
        }
        let scheme = self.uri.scheme_str().unwrap_or_default();
        if reference.starts_with("//") {
            return Self::parse(&format!("{scheme}:{reference}"));
        }
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        let path = match reference {
            "" => self.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
            _ if reference.starts_with('/') => reference.to_owned(),
            _ if reference.starts_with('?') => format!("{}{reference}", self.uri.path()),
            _ => relative(self.uri.path(), reference),
        };
        Self::parse(&format!("{scheme}://{authority}{path}"))
    }
}

impl fmt::Display for Address {
    /// Without secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked(&self.uri.to_string()))
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether a reference begins with `scheme:`.
fn has_scheme(reference: &str) -> bool {
    let Some((scheme, _)) = reference.split_once(':') else { return false };
    scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// `reference` next to the last part of `path`, its `.` and `..` resolved.
fn relative(path: &str, reference: &str) -> String {
    let (reference, query) = match reference.split_once('?') {
        Some((reference, query)) => (reference, format!("?{query}")),
        None => (reference, String::new()),
    };
    let mut parts: Vec<&str> = path.split('/').skip(1).collect();
    parts.pop();
    for part in reference.split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}{query}", parts.join("/"))
}

/// An address as it may be shown: without user, password and query, which may hold a key. Any text is
/// taken; where it is unclear what is a password, more is left out.
pub(crate) fn masked(text: &str) -> String {
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), text),
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let named = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    // A password with a slash in it ends the authority early, so the last `@` counts.
    let shown = match rest.rsplit_once('@') {
        Some((_, host)) if scheme.is_empty() || !authority.chars().all(named) => host,
        _ => rest,
    };
    match shown.find(['?', '#']) {
        Some(end) => format!("{scheme}{}?...", &shown[..end]),
        None => format!("{scheme}{shown}"),
    }
}

#[cfg(test)]
#[path = "address_tests.rs"]
mod tests;
