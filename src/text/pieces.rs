/*! A text's ids in bounded memory: tokenized piece by piece, with the ids of the entire text.

A tokenizer takes some 150 bytes of memory for a byte of text, so a long text cannot be tokenized in one piece.
It cannot be cut anywhere either: the ids next to a cut would be those of another text. So pieces overlap. The next
one begins at a token of the one before, and the two are joined at a place `p` in the overlap where

1. both have the same tokens (id, bytes, beginnings of words) for a stretch on either side of `p`, and
2. the stretch holds so many characters on either side that no decision about the text reaches across it
   ([`Reach`](super::reach::Reach) has their number, and which characters do not count).

Ids before `p` come from the piece that contains the text before, ids after `p` from the one that contains the text
after. They are the ids of the entire text, by induction over the pieces, stage by stage:

*Added tokens* are the leftmost longest matches. A match is one token, so in neither piece does one reach
across `p`; one that would need text beyond the stretch is longer than any added token, or swallows white
space, which then does not count as a character of the stretch.

*Normalizers* look at single characters, at clusters of them, or at the matches of an expression. With
clusters only ASCII and alphanumeric characters count. Expressions are treated as below.

*Words.* An expression is searched from the end of its last match, so two scans of a text that both have a
match begin or end at `p` continue equally as long as they read the same. A scan reads a bounded length beyond the
end of a match, except for repetitions after which something has to match (`pattern.rs`): those characters do
not count, so a scan that decides something before `p` has not read to the end of the first piece. With
such an expression `p` is the beginning of a word. Other pre-tokenizers split by the characters next to a place.

*BPE* merges the pair of lowest rank until there is none. If no merge crosses a place, either side is merged as
if it were alone. Therefore a sequence of tokens is the result for its text if and only if each two neighbours
are the result for theirs: of all merges that cross the place between two tokens the first would also cross
it if there were nothing but these two, because until then either token has had the same merges. All neighbours
before `p` are neighbours in the first piece, all others in the second. So `p` may be inside a word, however long.
Words of WordPiece, WordLevel, Unigram, and of a BPE that looks entire words up, depend on all of their
characters: there `p` is the beginning of a word.

If pieces cannot be joined, because a word or a run of white space is longer than the overlap, the overlap
grows, then the first piece. In the worst case, or with a component of unknown reach, the piece is the entire text.
The beginning and end of a text (`Prepend`, the post-processor's tokens) affect only the first and last ids: the
first tokens of every other piece are not used. */

use std::ops::{ControlFlow, Range};

use super::Tokenizer;
use super::reach::Reach;
use crate::progress::Progress;
use crate::{Error, Result};

/// Bytes of a piece, as long as pieces can be joined.
pub(super) const PIECE_BYTES: usize = 256 << 10;

/// The parts of a piece that the next one overlaps, tried one after another.
const OVERLAPS: [usize; 3] = [32, 8, 2];

/// Bytes before a token of the current piece where the next one begins. In a run of one character the tokens of
/// both are aligned only if the prefix that a normalizer adds compensates for the shift.
const SHIFTS: [usize; 5] = [0, 1, 3, 7, 15];

/// Tokens that both pieces have in common before the place where they are joined.
const COMMON_TOKENS: usize = 16;

/// A token and its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) id: u32,
    /// Whether a word of the pre-tokenizer begins with it.
    pub(super) begins_word: bool,
    /// Its bytes in the piece.
    pub(super) start: usize,
    pub(super) end: usize,
}

/// Takes the ids in order; [`ControlFlow::Break`] when it needs no more.
pub(super) type Sink<'s> = &'s mut dyn FnMut(&[u32]) -> Result<ControlFlow<()>>;

/// Tokenizes a text that comes in parts.
pub(super) struct Pieces<'t> {
    tokenizer: &'t Tokenizer,
    progress: &'t dyn Progress,
    sink: Sink<'t>,
    /// Bytes of a piece in the usual case.
    piece: usize,
    /// The pushed text whose ids are not final: the current piece and what follows.
    text: String,
    current: Option<Piece>,
    /// Bytes of `text` that the next step needs.
    needed: usize,
    flow: ControlFlow<()>,
}

/// The beginning of the text whose ids are not final, tokenized.
struct Piece {
    tokens: Vec<Token>,
    /// Its length in bytes.
    len: usize,
    /// The first token whose id was not emitted yet.
    next: usize,
}

impl<'t> Pieces<'t> {
    /// Begins a text; its ids go to `sink`.
    pub(super) fn begin(
        tokenizer: &'t Tokenizer,
        piece: usize,
        progress: &'t dyn Progress,
        sink: Sink<'t>,
    ) -> Result<Self> {
        let flow = sink(tokenizer.before())?;
        let text = String::new();
        Ok(Self { tokenizer, progress, sink, piece, text, current: None, needed: piece, flow })
    }

    /// Adds to the text. Breaks when no more of it is needed.
    pub(super) fn push(&mut self, mut text: &str) -> Result<ControlFlow<()>> {
        let Some(reach) = self.tokenizer.reach() else {
            self.text.push_str(text);
            return Ok(self.flow);
        };
        while self.flow.is_continue() {
            let missing = self.needed.saturating_sub(self.text.len());
            let part = text.ceil_char_boundary(missing.min(text.len()));
            self.text.push_str(&text[..part]);
            text = &text[part..];
            if self.text.len() < self.needed {
                break;
            }
            self.step(reach)?;
        }
        Ok(self.flow)
    }

    /// Ends the text.
    pub(super) fn finish(mut self) -> Result<()> {
        if self.flow.is_break() {
            return Ok(());
        }
        if let (Some(reach), Some(_)) = (self.tokenizer.reach(), &self.current) {
            let (len, all) = (self.len(), self.text.len());
            if len < all && !self.join(reach, all)? && self.flow.is_continue() {
                self.grow(all)?;
            }
            self.emit(usize::MAX)?;
        } else {
            let ids = self.tokenizer.ids(std::mem::take(&mut self.text), self.progress)?;
            self.flow = (self.sink)(&ids)?;
        }
        if self.flow.is_continue() {
            let _ = (self.sink)(self.tokenizer.after())?;
        }
        Ok(())
    }

    /// Joins the current piece with the next one, or makes it longer.
    fn step(&mut self, reach: &Reach) -> Result<()> {
        if self.current.is_none() {
            let len = self.text.floor_char_boundary(self.piece);
            let tokens = self.tokenizer.tokens(&self.text[..len], self.progress)?;
            self.current = Some(Piece { tokens, len, next: 0 });
        } else if !self.join(reach, self.piece)? {
            self.grow(self.text.len())?;
        }
        let len = self.len();
        // Enough for the next piece, and for as much again if they cannot be joined.
        self.needed = len + len.max(self.piece);
        Ok(())
    }

    fn len(&self) -> usize {
        self.current.as_ref().map_or(0, |piece| piece.len)
    }

    /// Moves to a next piece of `len` bytes, or returns false if it cannot be joined with the current one.
    fn join(&mut self, reach: &Reach, len: usize) -> Result<bool> {
        let shifts = if reach.at_words { &SHIFTS[..1] } else { &SHIFTS };
        for (part, shift) in OVERLAPS.iter().flat_map(|part| shifts.iter().map(move |s| (part, s)))
        {
            let current = self.current.as_ref().expect("the caller has a piece");
            let token = current.beginning(&self.text, reach, current.len / part);
            let begin = token.and_then(|token| token.checked_sub(*shift));
            let Some(begin) = begin.filter(|begin| *begin > 0) else { continue };
            let begin = self.text.floor_char_boundary(begin);
            let end = begin.saturating_add(len).max(current.len + self.piece / 2);
            let end = self.text.floor_char_boundary(end);
            let tokens = self.tokenizer.tokens(&self.text[begin..end], self.progress)?;
            let Some((settled, next)) = joint(&self.text, reach, current, begin, &tokens) else {
                continue;
            };
            self.emit(settled)?;
            self.text.drain(..begin);
            self.current = Some(Piece { tokens, len: end - begin, next });
            return Ok(true);
        }
        Ok(false)
    }

    /// Tokenizes the current piece again, with what follows up to `len`.
    fn grow(&mut self, len: usize) -> Result<()> {
        let current = self.current.take().expect("the caller has a piece");
        let tokens = self.tokenizer.tokens(&self.text[..len], self.progress)?;
        let next = match current.tokens.get(current.next) {
            _ if current.next == 0 => Some(0),
            // The place where it was joined is far from both of its ends.
            Some(joint) => tokens.iter().position(|token| token == joint),
            None => None,
        };
        let next = next.ok_or_else(|| {
            Error::input(format!(
                "{} has other tokens for the beginning of a longer text",
                self.tokenizer.path()
            ))
            .hint("give a shorter text, or report this with the tokenizer")
        })?;
        self.current = Some(Piece { tokens, len, next });
        Ok(())
    }

    /// Emits the current piece's ids before the token `end`.
    fn emit(&mut self, end: usize) -> Result<()> {
        let current = self.current.as_mut().expect("the caller has a piece");
        let end = end.min(current.tokens.len());
        let tokens = &current.tokens[current.next.min(end)..end];
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        current.next = end;
        if self.flow.is_continue() {
            self.flow = (self.sink)(&ids)?;
        }
        Ok(())
    }
}

impl Piece {
    /// Where the next piece begins, about `overlap` bytes before the end: at a token after the first one that
    /// is not emitted yet.
    fn beginning(&self, text: &str, reach: &Reach, overlap: usize) -> Option<usize> {
        let earliest = self.len - overlap;
        let first = self.tokens.partition_point(|token| token.start < earliest);
        let first = first.max(self.next + 1);
        (first..self.tokens.len())
            .find(|&index| self.separates(text, reach, index))
            .map(|index| self.tokens[index].start)
    }

    /// Whether the text before this token and the text from it on may come from different pieces.
    fn separates(&self, text: &str, reach: &Reach, index: usize) -> bool {
        let (before, token) = (&self.tokens[index - 1], &self.tokens[index]);
        // Several tokens may share a character.
        before.end <= token.start
            && token.start < token.end
            && text.is_char_boundary(token.start)
            && (!reach.at_words || token.begins_word)
    }
}

/// Where a piece is joined with the one that begins at its byte `begin`: the number of the same token in either.
fn joint(
    text: &str,
    reach: &Reach,
    piece: &Piece,
    begin: usize,
    following: &[Token],
) -> Option<(usize, usize)> {
    let same = |one: &Token, other: &Token| {
        (one.id, one.begins_word) == (other.id, other.begins_word)
            && (one.start, one.end) == (other.start + begin, other.end + begin)
    };
    let first = piece.tokens.partition_point(|token| token.start < begin);
    let (mut a, mut b) = (first.max(piece.next), 0);
    while a < piece.tokens.len() && b < following.len() {
        let both = piece.tokens[a..].iter().zip(&following[b..]);
        let common = both.take_while(|(one, other)| same(one, other)).count();
        if let Some(index) = joint_within(text, reach, piece, a..a + common) {
            return Some((index, b + (index - a)));
        }
        (a, b) = (a + common, b + common);
        let (Some(one), Some(other)) = (piece.tokens.get(a), following.get(b)) else { break };
        // Advance in the piece that lags.
        let order = one.start.cmp(&(other.start + begin));
        a += usize::from(order.is_le());
        b += usize::from(order.is_ge());
    }
    None
}

/// One of these common tokens with enough text in them on either side of it.
fn joint_within(text: &str, reach: &Reach, piece: &Piece, common: Range<usize>) -> Option<usize> {
    let tokens = piece.tokens.get(common.clone()).filter(|tokens| tokens.len() > COMMON_TOKENS)?;
    let (start, end) = (tokens[0].start, tokens[tokens.len() - 1].end);
    let settled = start + reach.settled_after(text.get(start..end)?)?;
    // The first place that has enough text before it leaves the most after it.
    let mut places = common.skip(COMMON_TOKENS);
    let index = places.find(|index| {
        piece.tokens[*index].start >= settled && piece.separates(text, reach, *index)
    })?;
    reach.settled_after(text.get(piece.tokens[index].start..end)?).map(|_| index)
}

#[cfg(test)]
#[path = "pieces_tests.rs"]
mod tests;
