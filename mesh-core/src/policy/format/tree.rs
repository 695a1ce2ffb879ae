//! HuJSON with its comments, and where its author broke lines.
//!
//! Reads what [`super::hujson::parse`] found good, so it need not say what is wrong; whatever odd
//! place a comment stands in, it ends up before, in or behind an item.

/// One comment, its brackets or slashes included.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comment<'a> {
    pub(super) text: &'a str,
    /// An empty line stands before it.
    pub(super) blank: bool,
}

impl Comment<'_> {
    /// Runs to the end of its line, or over several.
    fn ends_line(&self) -> bool {
        self.text.starts_with("//") || self.text.contains('\n')
    }
}

/// A whole text.
#[derive(Debug)]
pub(super) struct Text<'a> {
    pub(super) leading: Vec<Comment<'a>>,
    pub(super) value: Option<Item<'a>>,
    pub(super) trailing: Vec<Comment<'a>>,
}

/// A value, and in an object its name.
#[derive(Debug)]
pub(super) struct Item<'a> {
    /// An empty line stands before the item or its first comment.
    pub(super) blank: bool,
    pub(super) leading: Vec<Comment<'a>>,
    pub(super) blank_after_leading: bool,
    pub(super) name: Option<&'a str>,
    pub(super) before_value: Vec<Comment<'a>>,
    pub(super) body: Body<'a>,
    pub(super) trailing: Vec<Comment<'a>>,
}

#[derive(Debug)]
pub(super) enum Body<'a> {
    /// A string, number or word, as written.
    Plain(&'a str),
    Composite {
        brackets: [char; 2],
        items: Vec<Item<'a>>,
        /// Behind the last item.
        dangling: Vec<Comment<'a>>,
        /// An item a line.
        spread: bool,
    },
}

impl Item<'_> {
    pub(super) fn is_spread(&self) -> bool {
        let many_lines = self.before_value.iter().any(Comment::ends_line);
        many_lines || self.body.has_lines()
    }
}

impl Body<'_> {
    /// Whether it takes more than one line.
    fn has_lines(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Composite { items, spread, .. } => *spread || items.iter().any(Item::is_spread),
        }
    }
}

pub(super) fn read(text: &str) -> Text<'_> {
    let mut reader = Reader { rest: text };
    let mut leading = reader.comments().comments;
    if let Some(first) = leading.first_mut() {
        first.blank = false;
    }
    let Some(mut value) = reader.value() else {
        return Text {
            leading,
            value: None,
            trailing: Vec::new(),
        };
    };
    let behind = reader.comments();
    let beside = behind.beside;
    let mut trailing = behind.comments;
    value.trailing = trailing.drain(..beside).collect();
    Text {
        leading,
        value: Some(value),
        trailing,
    }
}

/// What stands between two tokens.
#[derive(Debug, Default)]
struct Gap<'a> {
    comments: Vec<Comment<'a>>,
    /// How many of the comments stand on the line of the token before.
    beside: usize,
    /// A line ends in it.
    breaks: bool,
    /// An empty line ends it.
    blank: bool,
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        taken
    }

    fn comments(&mut self) -> Gap<'a> {
        let mut gap = Gap::default();
        loop {
            let space =
                self.rest.len() - self.rest.trim_start_matches([' ', '\t', '\n', '\r']).len();
            let lines = self.take(space).matches('\n').count();
            gap.breaks |= lines > 0;
            gap.blank = lines > 1;
            let length = match self.rest.as_bytes() {
                [b'/', b'/', ..] => self.rest.find('\n').unwrap_or(self.rest.len()),
                [b'/', b'*', ..] => self.rest.find("*/").map_or(self.rest.len(), |end| end + 2),
                _ => return gap,
            };
            if !gap.breaks {
                gap.beside += 1;
            }
            let comment = Comment {
                text: self.take(length).trim_end(),
                blank: gap.blank,
            };
            gap.comments.push(comment);
        }
    }

    fn value(&mut self) -> Option<Item<'a>> {
        let body = match self.rest.as_bytes().first()? {
            b'{' => self.composite(['{', '}']),
            b'[' => self.composite(['[', ']']),
            b'"' => Body::Plain(self.string()),
            _ => {
                let end = self.rest.find([',', ']', '}', ' ', '\t', '\n', '\r', '/']);
                Body::Plain(self.take(end.unwrap_or(self.rest.len())))
            }
        };
        Some(Item {
            blank: false,
            leading: Vec::new(),
            blank_after_leading: false,
            name: None,
            before_value: Vec::new(),
            body,
            trailing: Vec::new(),
        })
    }

    fn string(&mut self) -> &'a str {
        let mut escaped = false;
        let end = self.rest.char_indices().skip(1).find(|(_, c)| {
            let ends = *c == '"' && !escaped;
            escaped = *c == '\\' && !escaped;
            ends
        });
        self.take(end.map_or(self.rest.len(), |(at, _)| at + 1))
    }

    fn composite(&mut self, brackets: [char; 2]) -> Body<'a> {
        self.take(1);
        let mut items: Vec<Item<'a>> = Vec::new();
        let mut spread = false;
        let dangling = loop {
            let mut gap = self.comments();
            spread |= gap.breaks || gap.comments.iter().any(Comment::ends_line);
            let closes = self.rest.starts_with(brackets[1]);
            // What stands on the line of the item before is about that one, unless an item follows
            // on the very line.
            if let Some(last) = items.last_mut() {
                if gap.breaks || closes {
                    last.trailing.extend(gap.comments.drain(..gap.beside));
                }
                // A line holds one comment that runs to its end.
                let mut kinds = last.trailing.iter().map(|one| one.text.starts_with("//"));
                let room = kinds.position(|ends| ends).map(|at| at + 1);
                let more = last.trailing.split_off(room.unwrap_or(last.trailing.len()));
                let more = more.into_iter().map(|comment| Comment {
                    blank: false,
                    ..comment
                });
                gap.comments.splice(0..0, more);
            }
            if closes || self.rest.is_empty() {
                if let Some(first) = gap.comments.first_mut() {
                    first.blank &= !items.is_empty();
                }
                break gap.comments;
            }
            let blank = match gap.comments.first_mut() {
                Some(first) => std::mem::take(&mut first.blank),
                None => gap.blank,
            };
            let after_leading = !gap.comments.is_empty() && gap.blank;
            let Some(mut item) = self.member(brackets[0] == '{', gap.comments, &mut spread) else {
                break Vec::new();
            };
            item.blank = blank && !items.is_empty();
            item.blank_after_leading = after_leading;
            items.push(item);
        };
        self.take(1.min(self.rest.len()));
        Body::Composite {
            brackets,
            spread: spread && !(items.is_empty() && dangling.is_empty()),
            items,
            dangling,
        }
    }

    /// One item up to the comma behind it.
    fn member(
        &mut self,
        named: bool,
        mut leading: Vec<Comment<'a>>,
        spread: &mut bool,
    ) -> Option<Item<'a>> {
        let mut name = None;
        let mut before_value = Vec::new();
        if named {
            name = Some(self.string());
            let before_colon = self.comments().comments;
            self.take(1.min(self.rest.len()));
            let after_colon = self.comments().comments;
            for comment in before_colon.into_iter().chain(after_colon) {
                // Behind a comment to the end of the line there is no room for a value.
                match comment.text.starts_with("//") {
                    true => leading.push(Comment {
                        blank: false,
                        ..comment
                    }),
                    false => before_value.push(comment),
                }
            }
            *spread |= leading.iter().chain(&before_value).any(Comment::ends_line);
        }
        let mut item = self.value()?;
        item.name = name;
        item.leading = leading;
        item.before_value = before_value;
        let behind = self.rest;
        let gap = self.comments();
        if self.rest.starts_with(',') {
            self.take(1);
            *spread |= gap.breaks || gap.comments.iter().any(Comment::ends_line);
            item.trailing = gap.comments;
        } else {
            // The last item, without a comma: its list looks at what stands here.
            self.rest = behind;
        }
        Some(item)
    }
}
