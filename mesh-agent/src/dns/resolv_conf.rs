//! The text of resolv.conf: what the host had, and what we put there instead (resolv.conf(5)).
//!
//! Options and search domains of the host stay in force, since programs depend on them; only who
//! is asked changes, and the mesh domain comes first in the search list.

use std::net::IpAddr;

use super::protocol::Setting;

/// First line of every file of ours. Whoever finds it knows that the host's own is elsewhere.
pub const MARKER: &str =
    "# Written by mesh-dns-helper; the host's own file returns when the mesh goes down.\n";

/// The stub of systemd-resolved listens here. It is no server that we could ask behind its back:
/// it may be asking us.
pub const RESOLVED_STUB: [&str; 2] = ["127.0.0.53", "127.0.0.54"];

/// Older C libraries take six search domains (resolv.conf(5), MAXDNSRCH).
const MAX_SEARCH: usize = 6;

/// What matters of a resolv.conf. The words are as they stood there, except that none can hold
/// whitespace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ResolvConf {
    /// Each an address, perhaps with `%zone`.
    pub servers: Vec<String>,
    pub search: Vec<String>,
    pub options: Vec<String>,
}

impl ResolvConf {
    /// Reads any text; what is not understood is left out, as the C library does.
    pub fn parse(text: &str) -> Self {
        let mut parsed = Self::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let keyword = words.next();
            let words = words
                .take_while(|word| !word.starts_with(['#', ';']))
                .map(str::to_owned);
            match keyword {
                Some("nameserver") => parsed
                    .servers
                    .extend(words.take(1).filter(|w| is_server(w))),
                // Each of the two replaces whatever came before it.
                Some("search") => parsed.search = words.collect(),
                Some("domain") => parsed.search = words.take(1).collect(),
                Some("options") => parsed.options.extend(words),
                _ => {}
            }
        }
        parsed
    }

    /// The file that makes the host ask us, and look short names up in the mesh first.
    pub fn render(&self, setting: &Setting) -> String {
        let mut text = MARKER.to_owned();
        for server in &setting.servers {
            text += &format!("nameserver {server}\n");
        }
        let own = setting.domain.as_str();
        let others = self.search.iter().map(String::as_str);
        let others = others.filter(|domain| *domain != own && *domain != ".");
        let search: Vec<&str> = [own].into_iter().chain(others).take(MAX_SEARCH).collect();
        text += &format!("search {}\n", search.join(" "));
        // We validate nothing, so nobody is to trust our AD bit; and the order of our own
        // addresses carries no load to spread.
        let kept = self.options.iter().map(String::as_str);
        let kept: Vec<&str> = kept
            .filter(|option| !["trust-ad", "rotate"].contains(option))
            .collect();
        if !kept.is_empty() {
            text += &format!("options {}\n", kept.join(" "));
        }
        text
    }
}

fn is_server(word: &str) -> bool {
    let address = word.split_once('%').map_or(word, |(address, _)| address);
    address.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::protocol::Request;
    use super::*;

    fn setting() -> Setting {
        let line = b"set mesh0 mesh.internal 100.64.0.1,fd01::1 mesh.internal";
        match Request::parse(line) {
            Ok(Request::Set(setting)) => setting,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_host_keeps_its_options_and_search_domains() {
        let before = "; by hand\nnameserver 10.0.0.1 # first\nnameserver fe80::1%eth0\n\
                      domain old\nsearch corp.example lab.example\nnameserver nonsense\n\
                      options edns0 rotate\noptions trust-ad timeout:1\nsortlist 10.0.0.0\n";
        let parsed = ResolvConf::parse(before);
        assert_eq!(parsed.servers, ["10.0.0.1", "fe80::1%eth0"]);
        let ours = parsed.render(&setting());
        assert_eq!(
            ours.strip_prefix(MARKER).unwrap(),
            "nameserver 100.64.0.1\nnameserver fd01::1\n\
             search mesh.internal corp.example lab.example\noptions edns0 timeout:1\n"
        );
    }

    #[test]
    fn an_empty_file_is_enough_to_start_from() {
        assert_eq!(
            ResolvConf::parse("").render(&setting()),
            format!("{MARKER}nameserver 100.64.0.1\nnameserver fd01::1\nsearch mesh.internal\n")
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_and_ours_reads_back(text: String) {
            let ours = ResolvConf::parse(&text).render(&setting());
            prop_assert_eq!(ResolvConf::parse(&ours).servers, ["100.64.0.1", "fd01::1"]);
            prop_assert_eq!(&ResolvConf::parse(&ours).search[0], "mesh.internal");
        }
    }
}
