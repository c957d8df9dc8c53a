/*! Tests of addresses. */

use super::*;

fn address(text: &str) -> Address {
    Address::parse(text).unwrap_or_else(|| panic!("{text} is an address"))
}

#[test]
fn an_origin_is_scheme_host_and_port() {
    let hub = address("https://hub.example/a").origin();
    for same in ["https://hub.example:443/b", "HTTPS://HUB.example", "https://me:x@hub.example/"] {
        assert_eq!(address(same).origin(), hub, "{same}");
    }
    for other in [
        "http://hub.example/a",
        "https://hub.example:8443/a",
        "http://hub.example:443/a",
        "https://cdn.hub.example/a",
        "https://hub.example.evil.example/a",
        "https://hub.example:443@evil.example/a",
        "https://hub.example./a",
    ] {
        assert_ne!(address(other).origin(), hub, "{other}");
    }
}

#[test]
fn only_http_has_addresses() {
    for text in [
        "file:///etc/passwd",
        "ftp://h/x",
        "hub.example",
        "/a",
        "",
        "https://",
        "https:///x",
        "javascript:alert(1)",
        "https://me:secret/x@hub.example",
        "https://hub.example:99999/",
        "https://a b/",
        "https://h\\@evil.example/",
    ] {
        assert_eq!(Address::parse(text), None, "{text}");
    }
}

#[test]
fn redirects_lead_where_a_browser_would_go() {
    let from = address("https://hub.example:8443/api/models/old?x=1");
    for (to, leads) in [
        ("/new/name", "https://hub.example:8443/new/name"),
        ("new", "https://hub.example:8443/api/models/new"),
        ("../new?y=2", "https://hub.example:8443/api/new?y=2"),
        ("../../../../new", "https://hub.example:8443/new"),
        ("?y=2", "https://hub.example:8443/api/models/old?y=2"),
        ("", "https://hub.example:8443/api/models/old?x=1"),
        ("//cdn.example/x#y", "https://cdn.example/x"),
        ("http://cdn.example/x", "http://cdn.example/x"),
        ("/a:b", "https://hub.example:8443/a:b"),
    ] {
        assert_eq!(from.join(to), Some(address(leads)), "{to}");
    }
    for to in ["file:///etc/passwd", "data:text/plain,x", "ftp://h/x", "//", "http://", "/a b"] {
        assert_eq!(from.join(to), None, "{to}");
    }
}

#[test]
fn user_and_password_become_a_header_and_leave_the_address() {
    // `printf 'me:s@cret' | base64`
    let hub = address("https://me:s%40cret@hub.example:8443/x?y");
    assert_eq!(hub.basic_authorization().as_deref(), Some("Basic bWU6c0BjcmV0"));
    assert_eq!(hub.without_userinfo(), address("https://hub.example:8443/x?y"));
    assert_eq!(address("https://hub.example/a@b").basic_authorization(), None);
}

#[test]
fn secrets_are_masked_in_whatever_was_meant_as_an_address() {
    for (text, shown) in [
        ("https://hub.example/x", "https://hub.example/x"),
        ("https://hub.example/a@b", "https://hub.example/a@b"),
        ("https://me:secret@hub.example:8443/x", "https://hub.example:8443/x"),
        ("https://secret@hub.example", "https://hub.example"),
        ("https://me:sec/secret@hub.example/x", "https://hub.example/x"),
        ("https://me:12/secret@hub.example/x", "https://hub.example/x"),
        ("https://me:s?secret@hub.example/x", "https://hub.example/x"),
        ("https://me:s#secret@hub.example/x", "https://hub.example/x"),
        ("https://me:s@secret@hub.example/x", "https://hub.example/x"),
        ("https://hub.example/x?key=secret", "https://hub.example/x?..."),
        ("https://me:secret@hub.example?key=secret", "https://hub.example?..."),
        ("https://hub.example/x#secret", "https://hub.example/x?..."),
        ("me:secret@hub.example", "hub.example"),
        ("secret@hub.example/x", "hub.example/x"),
        ("ftp://me:secret@hub.example", "ftp://hub.example"),
        ("https://[::1]:8/x", "https://[::1]:8/x"),
    ] {
        assert_eq!(masked(text), shown, "{text}");
    }
    assert_eq!(format!("{:?}", address("https://me:secret@h/x?secret")), "https://h/x?...");
}
