import Glibc
import Testing

/// The command line of vxd, and what its unit gives it.
@Suite struct OptionTests {
  @Test(arguments: [
    (["--slots", "99"], "--slots: '99': expected an integer from 1 to 32"),
    (["--slots=0x4"], "--slots: '0x4': expected an integer from 1 to 32"),
    (["--nosuch"], "unknown option '--nosuch'"), (["-x"], "unknown option '-x'"), (["-vx"], "unknown option '-x'"),
    (["--socket"], "--socket: expected a value"), (["-s"], "-s: expected a value"),
    (["--verbose=3"], "--verbose=3: this option takes no value"), (["start"], "unexpected argument 'start'"),
    (["--socket="], "--socket: expected a path"),
    (["--admin-group", "no such group"], "'no such group': no such group"),
    (["--metr=1"], "'--metr=1' is ambiguous: expected one of --metrics-port, --metrics-socket"),
    (["--gr", "5"], "'--gr' is ambiguous: expected one of --grant-budget, --grant-share"),
    (["-v", "--metric", "x"], "'--metric' is ambiguous"),
  ])
  func wrongOptionsAreNamed(options: [String], words: String) {
    let outcome = ProgramRun(ProgramRun.path("vxd"), options)
    #expect(outcome.status == 2)
    #expect(outcome.errors.contains(words), "\(outcome.errors)")
  }

  /// All forms that getopt_long knows, up to an option that ends the program.
  @Test(arguments: [
    ["--slots=4", "-V"], ["--slots", "4", "--version"], ["-s/tmp/x", "-vV"],
    ["-s", "/tmp/x", "-p", "/nowhere", "--vers"],
  ])
  func optionsHaveTheUsualForms(options: [String]) {
    let outcome = ProgramRun(ProgramRun.path("vxd"), options)
    #expect(outcome.status == 0)
    #expect(outcome.output.hasPrefix("vxd "), "\(outcome.errors)")
  }

  /// vxd refuses to start for a group that does not exist: each that its unit names is made, and they are three roles.
  @Test func groupsOfTheUnitAreMade() {
    let root = "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/")
    func words(_ file: String) -> [String] {
      ProgramRun("/bin/cat", ["\(root)/deploy/\(file)"]).output.split { " =\n".contains($0) }.map(String.init)
    }
    func word(behind name: String, in words: [String]) -> String? { words.firstIndex(of: name).map { words[$0 + 1] } }
    let unit = words("vxd.service")
    let groups = [
      word(behind: "--operate-group", in: unit), word(behind: "--admin-group", in: unit),
      word(behind: "SocketGroup", in: words("vxd.socket")),
    ].compactMap { $0 }
    #expect(Set(groups).count == 3, "\(groups)")
    let made = words("sysusers.conf")
    for name in groups { #expect(made.contains(name), "\(name)") }
  }
}
