import ControlAPI
import Testing

@Suite struct VisibleTextTests {
  @Test(arguments: [
    ("plain text", "plain text"), ("a\u{1b}[2Jb", #"a\u001b[2Jb"#), ("tab\there", "tab\there"),
    ("two\nlines", #"two\u000alines"#), ("\u{9b}31m\u{7f}", #"\u009b31m\u007f"#), ("Grüße, 東京", "Grüße, 東京"),
    ("\u{202e}txt.exe", #"\u202etxt.exe"#), ("\r\n", #"\u000d\u000a"#),
  ]) func controlCharactersAreShownAsSuch(text: String, shown: String) {
    #expect(text.visible(keepsLines: false) == shown)
  }

  @Test func linesMayStay() { #expect("a\nb\r\n\u{1b}c".visible(keepsLines: true) == "a\nb\\u000d\n\\u001bc") }
}
